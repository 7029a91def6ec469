"""A stop signal in any phase leaves a checkpoint of that step and exit code 75, and the run goes on exactly."""

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from running import Enc, exact

from enc.encoder.checkpoints.folder import newest_complete, verify

STEPS = 24
OPTIONS = [
    f"trainer.max_steps={STEPS}",
    "trainer.save_steps=8",
    "trainer.save_total_limit=0",
    "trainer.eval_steps=6",
    "trainer.eval_max_batches=40",
    "model.dropout_prob=0.1",
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str], store: Path) -> Enc:
    """The run that nobody stopped."""
    whole = Enc(tmp_path_factory.mktemp("whole"), environment)
    ready = [f"dataset.pre_tokenize_output={store}", "trainer.output_dir=run", "trainer.disable_tqdm=true"]
    whole("launch", "pretrain", "smoke", *ready, *OPTIONS)
    return whole


def until(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    """Wait for a condition without missing a short one; fails when the process ends first."""
    limit = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, f"the run ended before its phase came (exit code {process.returncode})"
        assert time.monotonic() < limit
        time.sleep(0.0005)


def has_logged(run: Path, step: int) -> bool:
    path = run / "metrics.jsonl"
    return path.exists() and f'"step": {step},' in path.read_text()


PHASES: dict[str, Callable[[Path], bool]] = {
    "start": lambda run: (run / "launches" / "1").exists(),
    "step": lambda run: has_logged(run, 10),
    "evaluation": lambda run: has_logged(run, 12),  # the record of step 12 is written right before its evaluation
    "save": lambda run: (run / "checkpoints" / ".16.tmp").exists(),
}


@pytest.mark.parametrize(
    ("phase", "number", "nproc"),
    [
        *(pytest.param(phase, signal.SIGTERM, 1, id=f"TERM-{phase}") for phase in PHASES),
        *(pytest.param(phase, signal.SIGUSR1, 2, id=f"USR1x2-{phase}") for phase in ("step", "save")),
        *(
            pytest.param(phase, signal.SIGUSR1, 2, id=f"USR1x2-{phase}", marks=pytest.mark.slow)
            for phase in ("start", "evaluation")
        ),
    ],
)
def test_signal_saves_and_the_run_goes_on_exactly(
    enc: Enc, smoke: Callable[..., list[str]], undisturbed: Enc, phase: str, number: signal.Signals, nproc: int
) -> None:
    """Stopped by a signal at the start, in a step, an evaluation or a save; then resumed to the end."""
    process = enc.start(*smoke("run", *OPTIONS, f"launch.nproc_per_node={nproc}", "trainer.global_batch_size=4"))
    run = enc.folder / "run"
    until(lambda: PHASES[phase](run), process)
    process.send_signal(number)
    assert process.wait(timeout=120) == 75, (enc.folder / "background.log").read_text()

    stopped = [event for event in enc.events("run") if event["event"] == "signal"]
    assert [event["signal"] for event in stopped] == [number.name]
    folder = run / "checkpoints" / str(stopped[0]["step"])
    assert verify(folder).state == "complete"
    assert newest_complete(run) == (folder, [])
    if phase != "start":
        assert stopped[0]["step"] >= {"step": 10, "evaluation": 12, "save": 16}[phase]

    enc("resume", "latest", "--run", "run")
    if nproc == 1:
        assert exact(enc.records("run")) == exact(undisturbed.records("run"))
        assert exact(enc.records("run", "eval_loss")) == exact(undisturbed.records("run", "eval_loss"))
    assert [event["event"] for event in enc.events("run")][-1] == "finished"
    assert max(enc.records("run")) == STEPS


def test_second_rank_alone_can_stop_the_run(enc: Enc, smoke: Callable[..., list[str]]) -> None:
    """A signal that reaches one rank only stops all of them at the same step."""
    process = enc.start(*smoke("run", *OPTIONS, "trainer.max_steps=2000", "launch.nproc_per_node=2"))
    until(lambda: has_logged(enc.folder / "run", 3), process)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    last_rank = int(children.stdout.split()[-1])
    subprocess.run(["kill", "-USR2", str(last_rank)], check=True)
    assert process.wait(timeout=120) == 75
    folder, passed_over = newest_complete(enc.folder / "run")
    assert folder is not None
    assert not passed_over


def test_a_killed_rank_ends_the_run(enc: Enc, smoke: Callable[..., list[str]]) -> None:
    """When one rank is killed the others end too, with exit code 3 and the last checkpoint intact."""
    process = enc.start(*smoke("run", *OPTIONS, "trainer.max_steps=5000", "launch.nproc_per_node=2"))
    until(lambda: has_logged(enc.folder / "run", 9), process)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    subprocess.run(["kill", "-KILL", children.stdout.split()[-1]], check=True)
    assert process.wait(timeout=120) == 3
    assert "killed by SIGKILL" in (enc.folder / "background.log").read_text()
    assert newest_complete(enc.folder / "run")[0] is not None
