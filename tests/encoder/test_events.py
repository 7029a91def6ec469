"""Events of a run: one table, one writer, one page that tells them."""

import json
import re
from pathlib import Path

import pytest
from places import ROOT

from enc.encoder.events import EVENTS_FILE, Event, append_event
from enc.launcher.run_folder.events import read_events


def lines(folder: Path) -> list[str]:
    return (folder / EVENTS_FILE).read_text(encoding="utf-8").splitlines()


def test_a_line(tmp_path: Path) -> None:
    """A line has the time with its zone, the event's name and the fields in the order given."""
    append_event(tmp_path, Event.SIGNAL, signal="SIGTERM", step=3)
    pattern = (
        r'\{"time": "\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}", "event": "signal", "signal": "SIGTERM", "step": 3\}'
    )
    assert re.fullmatch(pattern, *lines(tmp_path))


def test_a_line_after_a_broken_one(tmp_path: Path) -> None:
    """After a line that was cut the next one begins on a line of its own; readers leave the cut one out."""
    (tmp_path / EVENTS_FILE).write_text('{"time": "2027-01')
    append_event(tmp_path, Event.RENDERED)
    append_event(tmp_path, Event.FINISHED, step=3)
    assert len(lines(tmp_path)) == 3
    assert [event["event"] for event in read_events(tmp_path)] == [Event.RENDERED, Event.FINISHED]


@pytest.mark.parametrize("fields", [{}, {"signal": "SIGTERM"}, {"signal": "SIGTERM", "step": 3, "steps": 3}])
def test_fields_of_an_event_are_checked(tmp_path: Path, fields: dict[str, object]) -> None:
    """A field that the table does not know, and one that is missing, are errors of the writer; nothing is written."""
    with pytest.raises(AssertionError, match="the event signal"):
        append_event(tmp_path, Event.SIGNAL, **fields)
    assert not (tmp_path / EVENTS_FILE).exists()


def test_fields_that_may_be_there(tmp_path: Path) -> None:
    """An attempt's end may name bad nodes, and a best evaluation has its metric by name."""
    ended = dict.fromkeys(Event.ATTEMPT_ENDED.fields)
    append_event(tmp_path, Event.ATTEMPT_ENDED, **ended)
    append_event(tmp_path, Event.ATTEMPT_ENDED, **ended, bad_nodes=["n1"])
    append_event(tmp_path, Event.BEST, step=3, eval_loss=2.5)
    assert json.loads(lines(tmp_path)[2])["eval_loss"] == 2.5


def test_the_table_of_the_docs() -> None:
    """docs/design.md lists every event with its fields and meaning."""
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    table = "\n".join(["| event | fields | meaning |", "|---|---|---|", *map(_row, Event)])
    assert table in page, f"docs/design.md lacks this table:\n{table}"


def _row(event: Event) -> str:
    fields = [*(f"`{name}`" for name in event.fields), *(f"`{name}` or none" for name in event.optional)]
    return f"| `{event}` | {', '.join([*fields, *(['metrics'] if event.metrics else [])])} | {event.meaning} |"
