"""A run ends with a paragraph that says what it was and what comes next."""

import json
import shlex
import shutil
from pathlib import Path

from running import Enc


def test_a_run_ends_with_what_it_did(enc: Enc, finished_run: Path) -> None:
    """Steps, losses and checkpoint are those of its files, and the commands can be typed."""
    log = next(finished_run.glob("logs/*/console.log")).read_text()
    records = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    closing = log[log.index("  finished") :]
    assert "finished  6 steps in " in closing
    assert f"training loss  {losses[0]:.4f} -> {losses[-1]:.4f} nats per label" in closing
    assert f"checkpoint  {finished_run}/checkpoints/6" in closing
    shutil.copytree(finished_run, enc.folder / "run")
    commands = [shlex.split(line) for line in closing.splitlines() if line.startswith("  enc ")]
    assert [words[:2] for words in commands] == [["enc", "report"], ["enc", "ckpt"]]
    enc(*commands[0][1:])


def test_a_finished_run_says_so(enc: Enc, finished_run: Path) -> None:
    """Resuming a run that has reached its last step says that nothing was left to train, and how to train more."""
    shutil.copytree(finished_run, enc.folder / "run")
    told = enc("resume", "latest", "--run", "run").stderr
    assert "there was nothing left to train" in told
    assert "trainer.max_steps=N" in told
