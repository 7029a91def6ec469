"""Metrics files stay one line a step, and lines fit a terminal."""

import json
from pathlib import Path

import pytest

from enc.encoder.config.load import load_text
from enc.encoder.run.displays import wandb_id
from enc.encoder.run.log import RunLog, cut_repeated, evaluation_line, train_line
from enc.encoder.tasks import TASKS, fit
from enc.encoder.text_table import table

PRETRAINING = TASKS["pretraining"]
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
    assert len(train_line(RECORD, PRETRAINING)) <= 80
    assert len(train_line({**RECORD, "loss": None, "mfu": None}, PRETRAINING)) <= 80
    evaluation = {"step": 1234567, "eval_loss": 10.123456, "eval_accuracy": 1.0, "eval_perplexity": 24920.7}
    assert len(evaluation_line(evaluation, "eval", PRETRAINING)) <= 80
    assert len(evaluation_line({**evaluation, "eval_loss": None, "eval_perplexity": None}, "eval", PRETRAINING)) <= 80
    text = table([("attention", "word " * 40), ("a", "b")])
    assert max(map(len, text.splitlines())) <= 80


def test_losses_have_their_unit() -> None:
    """A line shows the same loss in nats and in bits, and says which is which."""
    assert "loss 2.3100 nats (3.3326 bits)" in train_line({**RECORD, "loss": 2.31}, PRETRAINING)
    record = {"step": 7, "test_step": 4, "test_loss": 2.31, "test_accuracy": 0.5, "test_perplexity": 10.07}
    text = "step       4  test 2.3100 nats (3.3326 bits), accuracy 50.00%, perplexity 10.07"
    assert evaluation_line(record, "test", PRETRAINING) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (2.31, "2.3100"),
        (9.99999, "10.000"),
        (14.6051, "14.605"),
        (123456.7, "123457"),
        (1e9, "1e+09"),
        (None, "   nan"),
    ],
)
def test_numbers_fill_their_place(number: float | None, text: str) -> None:
    assert fit(number, 6) == text


def test_the_wandb_id_is_made_once_or_asked_for(tmp_path: Path) -> None:
    """A resumed run has the id of its first start; one that the config names is taken."""
    made = wandb_id(tmp_path, None)
    assert wandb_id(tmp_path, None) == made
    assert wandb_id(tmp_path, "mine") == "mine"
    assert wandb_id(tmp_path, None) == "mine"


def test_an_evaluation_says_how_far_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where there is no bar a line comes now and then; none of it when it is quick."""
    log = RunLog(tmp_path, load_text("{}", "defaults").config, 1, True, 0)
    log.evaluating(1, 40)
    log.next_word = 0.0
    log.evaluating(2, 40)
    log.evaluating(3, 40)
    log.close(0)
    assert capsys.readouterr().err.split() == ["evaluating,", "batch", "2", "of", "40"]
