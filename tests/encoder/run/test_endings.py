"""A training process ends by itself, whatever fails on its way out, and nothing that only shows a run can end it."""

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from running import Enc, exact

from enc.encoder.run.displays import Display


def test_a_disk_that_takes_nothing_more_ends_the_run_at_once(enc: Enc, smoke: Callable[..., list[str]]) -> None:
    """Neither event, traceback nor log can be written: exit code 3 within seconds, with batch workers alive.

    It takes a real interpreter, which waits for its batch workers unless it is left at once.
    """
    enc.real = True
    process = enc.start(*smoke("run", "trainer.max_steps=5000", "trainer.eval_steps=5000", "dataset.num_workers=1"))
    metrics, limit = enc.folder / "run" / "metrics.jsonl", time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.05)
    rank = json.loads((enc.folder / "run/logs/1/ranks/0.json").read_text())["pid"]
    resource.prlimit(rank, resource.RLIMIT_FSIZE, (1, 1))  # every write to a file fails from now on
    assert process.wait(timeout=30) == 3


@pytest.mark.parametrize("breaks", ["made", "shown", "closed"])
def test_what_only_shows_a_run_is_lost_alone(breaks: str) -> None:
    """It is told of once, with the reason, and never asked again."""

    class Plotter:
        def __init__(self) -> None:
            self._do("made")

        def show(self, numbers: dict[str, float], step: int) -> None:
            self._do("shown")

        def close(self, exit_code: int) -> None:
            self._do("closed")

        def _do(self, what: str) -> None:
            done.append(what)
            if what == breaks:
                raise ConnectionResetError("Connection lost")

    done: list[str] = []
    lost: list[tuple[str, str]] = []
    display = Display("W&B", Plotter, lambda *told: lost.append(told))
    display.show({"train/loss": 1.0}, 1)
    display.close(0)
    assert lost == [("W&B", "ConnectionResetError: Connection lost")]
    assert done == ["made", "shown", "closed"][: len(done)]
    assert done[-1] == breaks


def test_a_run_without_its_tensorboard_computes_the_same(
    enc: Enc, smoke: Callable[..., list[str]], finished_run: Path
) -> None:
    """Its folder cannot be made: every number is in `metrics.jsonl`, and the loss of the display is an event."""
    words = ["trainer.max_steps=6", "trainer.save_steps=3", "dataset.num_workers=0", "scheduler.total_steps=6"]
    (enc.folder / "board").mkdir()
    (enc.folder / "board" / "file").write_text("")
    enc(*smoke("run", *words, "trainer.tensorboard_dir=board/file/x"), code=2)  # found before
    process = enc.start(*smoke("run", *words, "trainer.tensorboard_dir=board/x"))
    limit = time.monotonic() + 60
    while not (enc.folder / "run" / "config.yaml").exists():
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.001)
    (enc.folder / "board").rename(enc.folder / "away")
    (enc.folder / "board").write_text("")
    assert process.wait(timeout=60) == 0
    lost = [event for event in enc.events("run") if event["event"] == "display_lost"]
    assert [event["display"] for event in lost] == ["TensorBoard"]
    whole = Enc(finished_run.parent, {}).records("run")
    assert exact(enc.records("run")) == exact(whole)
