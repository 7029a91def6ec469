"""Events of a run: every line of `events.jsonl`, and the one function that writes one.

A line is a JSON object with `time`, `event` (a name) and the fields of that event. The trainer, its supervisor and the
commands all append to the same file.
"""

import errno
import json
import os
import time
from enum import StrEnum
from pathlib import Path
from typing import Any

EVENTS_FILE = "events.jsonl"


class Event(StrEnum):
    """What can happen to a run: its name in the file, what it means, and its fields."""

    meaning: str
    fields: tuple[str, ...]
    optional: tuple[str, ...]
    metrics: bool
    """It also has metrics, under the names that the task gives them."""

    def __new__(
        cls,
        name: str,
        meaning: str,
        fields: tuple[str, ...] = (),
        optional: tuple[str, ...] = (),
        metrics: bool = False,
    ) -> "Event":
        event = str.__new__(cls, name)
        event._value_ = name
        event.meaning, event.fields, event.optional, event.metrics = meaning, fields, optional, metrics
        return event

    # --- asked for by a person ---
    SUBMITTED = (
        "submitted",
        "A job is in the queue.",
        ("job", "nodes", "nproc_per_node", "script", "after", "command", "git", "user"),
    )
    RENDERED = "rendered", "A job script was written, for somebody to submit."
    REHEARSED = "rehearsed", "A rehearsal begins."
    TROUBLE = "trouble", "A rehearsal makes trouble.", ("trouble", "step")
    IMPORTED = "imported", "The run was made from another tool's checkpoint.", ("step", "source")
    CANCELLED = "cancelled", "Somebody cancelled the run.", ("by",)

    # --- attempts, by the supervisor ---
    ATTEMPT = (
        "attempt",
        "The processes of an attempt are started.",
        ("attempt", "job", "nodes", "restart_count", "from_step"),
    )
    CODE_CHANGED = "code_changed", "The code is another than at the attempt before.", ("before", "now")
    HANG = "hang", "No rank made progress; those that stood still, and where.", ("attempt", "ranks", "detail")
    ATTEMPT_ENDED = (
        "attempt_ended",
        "An attempt is over: why, and what is done about it.",
        ("attempt", "cause", "step", "detail", "decision", "reason", "saved"),
        ("bad_nodes",),
    )
    NODE_EXCLUDED = "node_excluded", "The run stays away from a node, for these reasons.", ("node", "evidence")
    CONTINUED = "continued", "The next job of the run is in the queue.", ("job", "after")
    NOT_CONTINUED = "not_continued", "No further job could be had.", ("detail",)
    SUPERVISOR_LOST = "supervisor_lost", "The batch process was killed.", ("job", "detail")

    # --- training, by rank 0 ---
    STARTED = "started", "Training begins, with these choices.", ("step", "world_size", "choices")
    RESUMED = "resumed", "Training goes on from a checkpoint.", ("step", "world_size", "choices")
    SAVED = "saved", "A checkpoint is complete.", ("step", "path", "seconds", "stall_seconds", "deleted")
    BEST = "best", "An evaluation was better than all before, by this metric.", ("step",), (), True
    TESTED = "tested", "The test at the end, of the weights of `test_step`.", ("step", "test_step"), (), True
    SKIPPED_STEP = "skipped_step", "An update was not finite and is left out.", ("step", "loss", "grad_norm")
    DISPLAY_LOST = (
        "display_lost",
        "TensorBoard or W&B broke; the run goes on without it.",
        ("display", "error"),
    )
    STRAGGLER = "straggler", "A rank keeps the others waiting.", ("step", "rank", "host", "ratio")
    SIGNAL = "signal", "A signal came; the run saves and leaves.", ("signal", "step")
    FAILED = "failed", "Training ended with an error.", ("step", "error")
    FINISHED = "finished", "Training reached its last step.", ("step",)


def append_event(run_dir: Path, event: Event, /, **fields: Any) -> None:
    """Append an event to a run's file in one write, since others append too; its line is there when this returns.

    Raises OSError when it cannot be written whole.
    """
    _check_fields(event, fields)
    record = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, **fields}
    path = run_dir / EVENTS_FILE
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        line = f"{_missing_newline(file)}{json.dumps(record)}\n".encode()
        if os.write(file, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(file)


def _check_fields(event: Event, fields: dict[str, Any]) -> None:
    missing = [name for name in event.fields if name not in fields]
    assert not missing, f"the event {event} lacks {missing}"
    unknown = fields.keys() - {*event.fields, *event.optional}
    assert event.metrics or not unknown, f"the event {event} has no {unknown}"


def _missing_newline(file: int) -> str:
    """Return a line's end where the process that wrote the last line was killed before it."""
    size = os.fstat(file).st_size
    return "\n" if size and os.pread(file, 1, size - 1) != b"\n" else ""
