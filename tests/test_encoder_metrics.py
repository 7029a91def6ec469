"""Metrics files stay one line a step, and lines fit a terminal."""

import json
from pathlib import Path

from enc.encoder.metrics import cut_repeated, table, train_line

RECORD = {
    "step": 1234567,
    "loss": 10.123456,
    "grad_norm": 123.4567,
    "learning_rate": 1.2345e-4,
    "tokens_per_s": 312345.6,
    "mfu": 0.4321,
}


def test_repeated_steps_and_half_lines_are_moved(tmp_path: Path) -> None:
    """What a resumed run will write again goes to another file; what came before stays byte for byte."""
    path, moved = tmp_path / "metrics.jsonl", tmp_path / "repeated.jsonl"
    lines = [json.dumps({"step": step, "loss": step / 7}) + "\n" for step in range(1, 7)]
    path.write_text("".join(lines) + '{"step": 7, "lo')
    cut_repeated(path, 4, moved)
    assert path.read_text() == "".join(lines[:4])
    assert moved.read_text() == "".join(lines[4:]) + '{"step": 7, "lo'
    cut_repeated(path, 4, moved)
    assert path.read_text() == "".join(lines[:4])


def test_lines_fit_80_columns() -> None:
    """The widest numbers that training shows."""
    assert len(train_line(RECORD)) <= 80
    assert len(train_line({**RECORD, "loss": None, "mfu": None})) <= 80
    text = table([("attention", "word " * 40), ("a", "b")])
    assert max(map(len, text.splitlines())) <= 80
