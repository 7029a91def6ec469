"""Events of a run as people tell them. Pure."""

from collections.abc import Callable
from datetime import datetime
from typing import Any

from enc.encoder.events import Event
from enc.encoder.quantities import span
from enc.launcher.run_folder.read import count, number, seconds

Told = dict[str, Any]

_SENTENCES: dict[str, Callable[[Told], str]] = {
    Event.STARTED: lambda e: f"Training began at step {_step(e)} on {_ranks(e)}.",
    Event.RESUMED: lambda e: f"Training went on from step {_step(e)} on {_ranks(e)}.",
    Event.SAVED: lambda e: f"Checkpoint of step {_step(e)} saved in {_seconds(e, 'seconds')}"
                           f"; training waited {_seconds(e, 'stall_seconds')}.{_deleted(e)}",
    Event.BEST: lambda e: f"Step {_step(e)} is the best so far: {_metrics(e)}.",
    Event.TESTED: lambda e: f"Tested the weights of step {_count(e.get('test_step'))}: {_metrics(e)}.",
    Event.SIGNAL: lambda e: f"{e.get('signal', 'A signal')} came at step {_step(e)}; the run saved and left.",
    Event.FAILED: lambda e: f"It failed at step {_step(e)}: {e.get('error', '')}",
    Event.FINISHED: lambda e: f"Training reached its last step, {_step(e)}.",
    Event.SKIPPED_STEP: lambda e: f"The update of step {_step(e)} was not finite and is left out "
                                  f"(loss {e.get('loss')}, gradient norm {e.get('grad_norm')}).",
    Event.CANCELLED: lambda e: f"Cancelled by {e.get('by')}.",
}  # fmt: skip

_HIDDEN = ("time", "event", "choices", "path", "detail", "reason", "script")


def event_rows(events: list[Told]) -> list[tuple[str, str, str, str]]:
    """Return (time, time since the first event, name, words) of each event."""
    named = [event for event in events if event.get("event")]
    first = next((t for event in named if (t := seconds(event.get("time"))) is not None), None)
    return [
        (_clock(event), _after(event, first), str(event["event"]).replace("_", " "), words(event)) for event in named
    ]


def words(event: Told) -> str:
    """Return what happened: a sentence where there is one for it, else the sentences in it and its values."""
    sentence = _SENTENCES.get(str(event.get("event")))
    return sentence(event) if sentence else _values(event)


def _values(event: Told) -> str:
    sentences = [_sentence(event[key]) for key in ("detail", "reason") if event.get(key)]
    values = ", ".join(
        f"{key.replace('_', ' ')} {_value(v)}" for key, v in event.items() if key not in _HIDDEN and v not in ([], None)
    )
    return " ".join([*sentences, values]).strip()


def _clock(event: Told) -> str:
    """Return the time as it was where the run was."""
    try:
        return datetime.fromisoformat(event["time"]).strftime("%Y-%m-%d %H:%M:%S")
    except (KeyError, TypeError, ValueError):
        return str(event.get("time", ""))


def _after(event: Told, first: float | None) -> str:
    time = seconds(event.get("time"))
    return "" if time is None or first is None else f"+{span(time - first)}"


def _step(event: Told) -> str:
    return _count(event.get("step"))


def _count(value: Any) -> str:
    return "unknown" if count(value) is None else f"{value:,}"


def _ranks(event: Told) -> str:
    ranks = count(event.get("world_size"))
    return "one process" if ranks == 1 else f"{_count(ranks)} processes"


def _seconds(event: Told, key: str) -> str:
    value = number(event.get(key))
    return "an unknown time" if value is None else f"{value:.2g} s" if value < 10 else span(value)


def _deleted(event: Told) -> str:
    return f" Deleted: {_value(event['deleted'])}." if event.get("deleted") else ""


def _metrics(event: Told) -> str:
    found = {k: number(v) for k, v in event.items() if k not in ("time", "event", "step", "test_step")}
    return ", ".join(f"{k.replace('_', ' ')} {'not finite' if v is None else f'{v:.4g}'}" for k, v in found.items())


def _sentence(text: Any) -> str:
    words = str(text).strip().rstrip(".")
    return f"{words[:1].upper()}{words[1:]}."


def _value(value: Any) -> str:
    """Return a value without brackets: the items of lists, and `name value` pairs of what they hold."""
    if isinstance(value, list):
        between = "; " if any(isinstance(item, dict | list) or " " in str(item) for item in value) else ", "
        return between.join(map(_value, value))
    if isinstance(value, dict):
        return " ".join(f"{key} {_value(item)}" for key, item in value.items() if item is not None)
    return str(value)
