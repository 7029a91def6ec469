"""Events of a run: `events.jsonl`."""

from pathlib import Path
from typing import Any

from enc.encoder.events import EVENTS_FILE, Event
from enc.launcher.run_folder.read import objects


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """Return a run's events, oldest first; lines that are not whole are left out. A file that cannot be read raises."""
    try:
        content = (run_dir / EVENTS_FILE).read_bytes()
    except FileNotFoundError:
        return []
    return [event for event in objects(content) if "event" in event]


_BEGINNINGS = (Event.SUBMITTED, Event.RENDERED, Event.REHEARSED)


def since_submitted(run_dir: Path) -> list[dict[str, Any]]:
    """Return the events since a person last asked for a run."""
    events = read_events(run_dir)
    return events[max((i for i, event in enumerate(events) if event["event"] in _BEGINNINGS), default=0) :]
