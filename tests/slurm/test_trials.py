"""A signal in any phase costs no checkpoint: 40 trials on real jobs, with batch workers."""

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from cluster_slurm import Slurm
from jobs import Runs

from enc.encoder.checkpoints.folder import list_checkpoints, verify

PHASES = ["preprocess", "start", "build", "warm_up", "first batch", "compile", "forward", "evaluate", "save", "restore"]
SIGNALS = [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGUSR1]
STEPS = 80
WORDS = [f"trainer.max_steps={STEPS}", "trainer.save_steps=4", "trainer.save_total_limit=0", "trainer.eval_steps=6",
         "trainer.eval_max_batches=20", "dataset.num_workers=2", "model.dropout_prob=0.1", "--nodes", "2"]  # fmt: skip


@pytest.fixture(scope="module")
def runs(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str], store: Path) -> Runs:
    """A folder with `whole` and `whole-compiled`, which nobody disturbs."""
    runs = Runs(slurm, tmp_path_factory.mktemp("trials"), environment, store)
    local = ["--nproc", "2", "launch.scheduler=local"]
    runs.launch("whole", *WORDS[:-2], *local)
    runs.launch(
        "whole-compiled", *WORDS[:-2], *local, "trainer.torch_compile=true", "trainer.torch_compile_backend=aot_eager"
    )
    return runs


def phase_of(runs: Runs, run: str) -> str:
    """Return what rank 0 says it does, of the newest attempt."""
    attempts = sorted((runs.folder / run / "logs").glob("[0-9]*"), key=lambda p: int(p.name))
    try:
        return json.loads((attempts[-1] / "ranks" / "0.json").read_text())["phase"]
    except (IndexError, OSError, ValueError):
        return "none"


def is_reached(runs: Runs, run: str, phase: str) -> bool:
    folder = runs.folder / run
    match phase:
        case "preprocess":
            return any(runs.folder.glob(f"{run}-store*"))
        case "first batch":
            return any(event["event"] == "started" for event in runs.events(run))
        case "compile" | "warm_up":
            return phase_of(runs, run) == "warm_up" or runs.step(run) > 0
        case "save":
            return any((folder / "checkpoints").glob(".*.tmp")) or (folder / "checkpoints" / "4").exists()
        case "evaluate":
            return runs.step(run) >= 6
        case "forward":
            return runs.step(run) >= 2
    return phase_of(runs, run) == phase or runs.step(run) > 0


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_no_checkpoint_is_lost(runs: Runs, phase: str) -> None:
    """Four trials a phase: what was saved stays whole, and the run ends with the undisturbed bytes."""
    for trial, number in enumerate(SIGNALS):
        one_trial(runs, phase, f"{phase}-{trial}".replace(" ", "-"), number)


def one_trial(runs: Runs, phase: str, run: str, number: signal.Signals) -> None:
    compiled = phase == "compile"
    more = ["trainer.torch_compile=true", "trainer.torch_compile_backend=aot_eager"] if compiled else []
    if phase == "preprocess":
        more = [f"dataset.pre_tokenize_output={run}-store"]
    job = runs.launch(run, *WORDS, *more)
    if phase == "restore":
        runs.until_step(run, 5)
        runs.slurm("scancel", "--signal=USR1", job)
        runs.until(lambda: len(runs.endings(run)) == 1, run)
        runs.until(lambda: phase_of(runs, run) in ("start", "build", "warm_up", "restore"), run)
    runs.until(lambda: is_reached(runs, run, phase), run)
    time.sleep(random.Random(run).uniform(0, 0.5))
    kept = {path.name for path in list_checkpoints(runs.folder / run)}
    batch = ["--batch"] if phase == "preprocess" else []  # there are no ranks yet
    runs.slurm("scancel", f"--signal={number.name[3:]}", *batch, job)
    assert runs.until_over(run)["cause"] == "finished", runs.story(run)
    found = list_checkpoints(runs.folder / run)
    assert kept <= {path.name for path in found}
    assert all(verify(path).state == "complete" for path in found)
    assert runs.weights(run, STEPS) == runs.weights("whole-compiled" if compiled else "whole", STEPS)
    shutil.rmtree(runs.folder / run)
