"""What a run's events add up to: what state they leave it in, and why it stopped. Pure."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from enc.encoder.events import Event
from enc.launcher.run_folder.read import count, number, seconds, text, texts

RESTARTING = ("restart", "requeue", "resubmit", "next_task")
_STOPPED = ("signal", "time_limit", "preempted", "requeued")


@dataclass
class History:
    """What the events of a run add up to."""

    status: str = "unknown"
    """unknown, queued, starting, running, signal (saving), hang, failing, restarting, requeued, or how it ended:
    finished, failed, cancelled, stopped."""
    time: float | None = None  # of the last event
    began: float | None = None  # of the last attempt
    queued: float | None = None
    job: str | None = None
    jobs: list[str] = field(default_factory=list)
    attempt: int | None = None
    nodes: list[str] = field(default_factory=list)
    num_nodes: int | None = None
    step: int | None = None
    step_time: float | None = None
    signal_step: int | None = None
    saved: set[int] = field(default_factory=set)
    why: str | None = None
    """One sentence on why the run last stopped."""
    restarts: Counter[str] = field(default_factory=Counter)
    excluded_nodes: list[str] = field(default_factory=list)
    straggler: dict[str, Any] | None = None
    not_continued: bool = False  # no further job could be had


def history_of(events: list[dict[str, Any]]) -> History:
    """Go through a run's events, oldest first."""
    history = History()
    for event in events:
        name = text(event.get("event"))
        if name:
            history.time = seconds(event.get("time")) or history.time
            _apply(history, name, event)
    return history


def _apply(history: History, name: str, event: dict[str, Any]) -> None:
    match name:
        case Event.SUBMITTED:
            _note_job(history, event)
            history.num_nodes = count(event.get("nodes"))
            history.queued, history.not_continued = history.time, False
            history.status = "requeued" if history.status == "requeued" else "queued"
        case Event.RENDERED:
            history.status, history.why = "stopped", "Its job script was written; the job has not begun."
        case Event.CONTINUED:
            _note_job(history, event)
            history.status = "cancelled" if history.status == "cancelled" else "requeued"
        case Event.SUPERVISOR_LOST | Event.NOT_CONTINUED:
            history.why = text(event.get("detail")) or history.why
            history.not_continued = name == Event.NOT_CONTINUED
        case Event.ATTEMPT:
            _note_job(history, event)
            history.attempt = count(event.get("attempt"))
            history.nodes = texts(event.get("nodes"))
            _begin(history, "starting")
            _note_step(history, event.get("from_step"))
        case Event.STARTED | Event.RESUMED:
            _begin(history, "running")
            _note_step(history, event.get("step"))
        case Event.SAVED:
            history.saved.add(count(event.get("step")) or 0)
            if history.status in ("unknown", "starting"):  # what was before is not known
                history.status = "running"
        case Event.SIGNAL:
            history.signal_step = count(event.get("step"))
            _note_step(history, event.get("step"))
            if history.status != "cancelled":
                history.status = "signal"
                history.why = f"{text(event.get('signal')) or 'A signal'} came at step {_step(event)}."
        case Event.FINISHED:
            history.status, history.why = "finished", None
            _note_step(history, event.get("step"))
        case Event.FAILED:
            history.status = "failing"
            history.why = text(event.get("error")) or f"It failed at step {_step(event)}."
            _note_step(history, event.get("step"))
        case Event.HANG:
            history.status = "hang"
            history.why = text(event.get("detail")) or "No rank made progress."
        case Event.ATTEMPT_ENDED:
            _end_attempt(history, event)
        case Event.CANCELLED:
            history.status = "cancelled"
            history.why = f"Cancelled by {text(event.get('by')) or 'somebody'}."
        case Event.NODE_EXCLUDED:
            node = text(event.get("node"))
            if node and node not in history.excluded_nodes:
                history.excluded_nodes.append(node)
        case Event.STRAGGLER:
            kept = {"step": count(event.get("step")), "rank": count(event.get("rank")),
                    "host": text(event.get("host")), "ratio": number(event.get("ratio"))}  # fmt: skip
            history.straggler = kept if kept["rank"] is not None else history.straggler


def _end_attempt(history: History, event: dict[str, Any]) -> None:
    cause, decision = text(event.get("cause")) or "unknown", text(event.get("decision"))
    _note_step(history, event.get("step"))
    parts = [part.strip().rstrip(".") for key in ("detail", "reason") if (part := text(event.get(key)) or "").strip()]
    sentences = " ".join(f"{part[:1].upper()}{part[1:]}." for part in dict.fromkeys(parts))
    why = sentences or f"It ended by: {cause}."
    if decision in RESTARTING:
        history.restarts[cause] += 1
        history.why = why
        if history.status != "cancelled":
            history.status = "restarting" if decision == "restart" else "requeued"
        return
    if history.status == "cancelled" and cause in (*_STOPPED, "cancelled"):
        return
    history.why = None if cause == "finished" else why
    history.status = cause if cause in ("finished", "cancelled") else "stopped" if cause in _STOPPED else "failed"


def _begin(history: History, status: str) -> None:
    history.status, history.began, history.straggler, history.signal_step = status, history.time, None, None
    history.saved, history.not_continued = set(), False


def _note_job(history: History, event: dict[str, Any]) -> None:
    history.job = text(event.get("job"))
    if history.job and history.job not in history.jobs:
        history.jobs.append(history.job)


def _note_step(history: History, step: Any) -> None:
    if count(step) is not None:
        history.step, history.step_time = count(step), history.time


def _step(event: dict[str, Any]) -> str:
    step = count(event.get("step"))
    return "an unknown step" if step is None else str(step)
