"""Long work says how far it is, without a terminal too; who looks from outside sees the same line."""

import time
from pathlib import Path

import pytest

from enc.encoder import progress
from enc.encoder.progress import NOTE_FILE, Piece, shown


@pytest.mark.parametrize(
    ("piece", "line"),
    [
        (Piece("Evaluating", 0, None, "", 0.0), "Evaluating: 60 s"),
        (Piece("Evaluating", 10, 40, "", 0.0), "Evaluating: 10 of 40 (25%), 1 min, about 3 min left"),
        (Piece("Tokenising", 500, 1000, "1,234 tokens", 0.0), "Tokenising: 50%, 1,234 tokens, 1 min, about 1 min left"),
        (Piece("Training", 0, None, "9 documents read", 0.0), "Training: 9 documents read, 1 min"),
        (Piece("Evaluating", 40, 40, "", 0.0), "Evaluating: 40 of 40 (100%), 1 min"),
    ],
)
def test_a_line_has_count_and_time(piece: Piece, line: str) -> None:
    assert piece.line(60.0).replace("60 s", "1 min") == line.replace("60 s", "1 min")


def test_lines_come_without_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A log shows that work goes on, what is inside of it, and nothing of it is left at the end."""
    monkeypatch.setattr(progress, "_PATIENCE_S", 0.0)
    monkeypatch.setattr(progress, "_BETWEEN_LINES_S", 0.02)
    with shown("Outer", tmp_path) as show:
        show(1, 2)
        with shown("Inner"):
            time.sleep(0.3)
            assert (tmp_path / NOTE_FILE).read_text().startswith("Inner: ")
        time.sleep(0.3)
    lines = capsys.readouterr().err.splitlines()
    names = list(dict.fromkeys(line.partition(":")[0] for line in lines))
    assert names[-2:] == ["Inner", "Outer"]
    assert lines[-1].startswith("Outer: 1 of 2 (50%)")
    assert list(tmp_path.iterdir()) == []


def test_quick_work_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with shown("Quick") as show:
        show(1, 2)
    assert capsys.readouterr().err == ""


def test_a_failure_ends_the_display(tmp_path: Path) -> None:
    """Work that fails leaves no note, and what comes next is shown again."""
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), shown("Work", tmp_path), shown("Part"):
            1 / 0  # noqa: B018
        assert progress._open is None
