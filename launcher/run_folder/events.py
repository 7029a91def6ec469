"""Events of a run: `events.jsonl`."""

import errno
import json
import os
import time
from pathlib import Path
from typing import Any

from enc.launcher.run_folder.read import objects, tail


def append_event(run_dir: Path, name: str, **details: Any) -> None:
    """Append an event to a run's `events.jsonl`, in one write: the trainer may append at the same time."""
    record = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": name, **details}
    path = run_dir / "events.jsonl"
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        broken = tail(path, 1) not in (b"", b"\n")  # a line that was half written when its process was killed
        line = f"{chr(10) * broken}{json.dumps(record)}\n".encode()
        if os.write(file, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(file)


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """Return a run's events, oldest first; lines that are not whole are left out. A file that cannot be read raises."""
    try:
        content = (run_dir / "events.jsonl").read_bytes()
    except FileNotFoundError:
        return []
    return [event for event in objects(content) if "event" in event]


_BEGINNINGS = ("submitted", "rendered", "rehearsed")


def since_submitted(run_dir: Path) -> list[dict[str, Any]]:
    """Return the events since a person last asked for a run."""
    events = read_events(run_dir)
    return events[max((i for i, event in enumerate(events) if event["event"] in _BEGINNINGS), default=0) :]
