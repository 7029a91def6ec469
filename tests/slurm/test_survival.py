"""Whatever happens to a job, its run ends with the bytes of the run that nobody disturbed."""

import signal
from collections.abc import Callable

import pytest
from cluster_slurm import Slurm
from jobs import Runs
from running import exact

STEPS, SAVE_STEPS = 120, 10
WORDS = [f"trainer.max_steps={STEPS}", f"trainer.save_steps={SAVE_STEPS}", "trainer.save_total_limit=0",
         "trainer.eval_strategy=no", "model.dropout_prob=0.1", "dataset.num_workers=1",
         f"scheduler.total_steps={STEPS}"]  # fmt: skip
TWO = ["--nodes", "2"]


@pytest.fixture(scope="module")
def runs(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory, environment: dict, store) -> Runs:  # type: ignore[no-untyped-def]
    """A folder with `whole`: the same two ranks, started on one machine without SLURM, undisturbed."""
    runs = Runs(slurm, tmp_path_factory.mktemp("survival"), environment, store)
    runs.launch("whole", *WORDS, "--nproc", "2", "launch.scheduler=local")
    return runs


def scancel(number: str) -> Callable[[Runs, str, str], None]:
    return lambda runs, run, job: runs.slurm("scancel", f"--signal={number}", job) and None


def requeue(runs: Runs, run: str, job: str) -> None:
    runs.slurm("scontrol", "requeue", job)


def kill_rank(runs: Runs, run: str, job: str) -> None:
    runs.hit_rank(run, 1, signal.SIGKILL)


def kill_batch(runs: Runs, run: str, job: str) -> None:
    runs.kill_batch(run)


def fail_node(runs: Runs, run: str, job: str) -> None:
    """The second node loses its power; it is back half a minute later."""
    name = runs.events(run)[-1 - [e["event"] for e in reversed(runs.events(run))].index("attempt")]["nodes"][1]
    runs.slurm.fail_node(name)
    runs.until(lambda: runs.slurm("sinfo", "-h", "-N", "-n", name, "-o", "%t").strip().startswith("down"), run, 60)
    runs.slurm.start_node(name)


TROUBLES = {
    "USR1": ([scancel("USR1")], ["signal"]),
    "USR2": ([scancel("USR2")], ["signal"]),
    "TERM": ([scancel("TERM")], ["signal"]),
    "requeue": ([requeue], ["requeued"]),
    "killed rank": ([kill_rank], ["lost_rank"]),
    "killed batch process": ([kill_batch], ["lost_job"]),
    "failed node": ([fail_node], None),
    "killed rank, then TERM": ([kill_rank, scancel("TERM")], ["lost_rank", "signal"]),
    "killed batch process twice": ([kill_batch, kill_batch], ["lost_job", "lost_job"]),
}


SLOW = ("USR2", "TERM", "requeue", "failed node", "killed rank, then TERM", "killed batch process twice")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in TROUBLES]
)
def test_the_run_ends_with_the_same_bytes(runs: Runs, name: str) -> None:
    """Trouble hits the run in the middle; what it repeats is at most what came after its last save."""
    troubles, causes = TROUBLES[name]
    run = name.replace(" ", "-").replace(",", "")
    job = runs.launch(run, *WORDS, *TWO)
    for number, trouble in enumerate(troubles):
        runs.until_step(run, 14 + 40 * number)
        trouble(runs, run, job)
    last = runs.until_over(run)
    assert last["cause"] == "finished", runs.story(run)
    assert last["step"] == STEPS
    if causes is not None:
        assert [cause for cause, _ in runs.endings(run)] == [*causes, "finished"], runs.story(run)
    assert runs.weights(run, STEPS) == runs.weights("whole", STEPS)
    assert exact(runs.enc.records(run)) == exact(runs.enc.records("whole"))
    starts = [event["from_step"] for event in runs.events(run) if event["event"] == "attempt"]
    ends = [event["step"] for event in runs.events(run) if event["event"] == "attempt_ended"]
    assert all(end - start < SAVE_STEPS + 1 for start, end in zip(starts[1:], ends, strict=False))
