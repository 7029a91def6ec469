"""What is started again, what never is, and what a job does about its time, its ranks and its nodes."""

import json
import signal
import time
from pathlib import Path

import pytest
from cluster_slurm import Slurm
from jobs import Runs

WORDS = ["trainer.save_steps=10", "trainer.save_total_limit=0", "trainer.eval_strategy=no", "--nodes", "2"]
LONG = [*WORDS, "trainer.max_steps=100000"]
MIDDLE = [*WORDS, "trainer.max_steps=400", "scheduler.total_steps=400"]
SHORT = [*WORDS, "trainer.max_steps=30", "scheduler.total_steps=30"]


@pytest.fixture(scope="module")
def runs(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory, environment: dict, store: Path) -> Runs:
    return Runs(slurm, tmp_path_factory.mktemp("decisions"), environment, store)


def is_gone(runs: Runs, job: str) -> bool:
    """Whether a job neither runs nor waits."""
    return runs.slurm("squeue", "-h", "-j", job, "-t", "PENDING,RUNNING,COMPLETING", "-o", "%T").strip() == ""


def test_an_operators_scancel_is_final(runs: Runs) -> None:
    """The run is saved, its last word says who stopped it, and no job follows."""
    job = runs.launch("cancelled", *LONG)
    runs.until_step("cancelled", 12)
    runs.slurm("scancel", job)
    last = runs.until_over("cancelled")
    assert last["cause"] == "cancelled"
    assert (runs.folder / "cancelled" / "checkpoints" / str(last["step"]) / "manifest.json").is_file()
    runs.until(lambda: is_gone(runs, job), "cancelled")
    time.sleep(2)
    assert is_gone(runs, job)


def test_a_config_error_is_final(runs: Runs) -> None:
    """A config that is spoilt while the job waits ends it once, with the sentence about the key."""
    job = runs.launch("spoilt", *SHORT, 'launch.slurm.directives=["--hold"]')
    path = runs.folder / "spoilt" / "config.yaml"
    path.write_text(path.read_text().replace("max_steps: 30", "max_steps: -30"))
    runs.slurm("scontrol", "release", job)
    last = runs.until_over("spoilt")
    assert last["cause"] == "config"
    assert "trainer.max_steps is -30" in last["detail"]
    runs.until(lambda: is_gone(runs, job), "spoilt")


def test_three_crashes_at_the_same_step_are_final(runs: Runs) -> None:
    """A save that never fits ends the run with one paragraph that names the step and the error."""
    job = runs.launch("crashing", *LONG, 'launch.setup=["ulimit -f 300"]')
    last = runs.until_over("crashing")
    assert [cause for cause, _ in runs.endings("crashing")] == ["crash"] * 3
    assert "3 attempts in a row got no further than step" in last["reason"]
    assert "The checkpoint could not be written" in last["reason"]
    assert last["reason"] in (runs.folder / "crashing" / "logs" / f"slurm-{job}.log").read_text()
    runs.until(lambda: is_gone(runs, job), "crashing")


def test_a_stopped_rank_is_found_and_named(runs: Runs) -> None:
    """SIGSTOP sends no word to anybody: the watchdog kills what hangs, and the same job goes on."""
    job = runs.launch("hanging", *WORDS, "trainer.max_steps=400", "launch.hang_timeout_s=15")
    runs.until_step("hanging", 15)
    began = time.monotonic()
    runs.hit_rank("hanging", 1, signal.SIGSTOP)
    runs.until(lambda: runs.endings("hanging") != [], "hanging")
    assert time.monotonic() - began < 15 + 10
    hang = next(event for event in runs.events("hanging") if event["event"] == "hang")
    first = hang["ranks"][0]
    assert (first["rank"], first["host"]) == (1, "n2" if "n2" in hang["detail"] else first["host"])
    assert first["silent_s"] > 10
    assert runs.until_over("hanging")["cause"] == "finished"
    assert runs.endings("hanging") == [("hang", "restart"), ("finished", "stop")]
    assert {event["job"] for event in runs.events("hanging") if event["event"] == "attempt"} == {job}


def test_a_node_that_fails_at_the_start_twice_is_excluded(runs: Runs) -> None:
    """The evidence of both attempts is kept, and another job goes on elsewhere."""
    runs.slurm.until_idle()
    runs.slurm.spoil_node("n2")
    try:
        first = runs.launch("bad-node", *SHORT)
        assert runs.until_over("bad-node")["cause"] == "finished"
    finally:
        runs.slurm.spoil_node("n2", bad=False)
    events = runs.events("bad-node")
    excluded = [event for event in events if event["event"] == "node_excluded"]
    assert [event["node"] for event in excluded] == ["n2"]
    assert excluded[0]["evidence"] == [
        f"attempt {n}: rank 1 on n2 did not start (exited with exit code 1)" for n in (1, 2)
    ]
    assert runs.endings("bad-node") == [
        ("start_failure", "restart"), ("start_failure", "resubmit"), ("finished", "stop")
    ]  # fmt: skip
    attempts = [event for event in events if event["event"] == "attempt"]
    assert attempts[2]["job"] != first
    assert "n2" not in attempts[2]["nodes"]


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_the_time_limit_comes(runs: Runs, times: int) -> None:
    """The run stops itself when saving is all there is time for, and goes on in the next job, as often as it takes.

    The ranks are held from outside until their job asks them to leave: the job is slow, the test is not.
    """
    limited, unlimited = f"limited-{times}", f"unlimited-{times}"
    runs.launch(unlimited, *WORDS[:-2], *MIDDLE[-2:], "--nproc", "2", "launch.scheduler=local")
    runs.launch(limited, *MIDDLE, "launch.slurm.time=1", "launch.hang_timeout_s=600")
    for attempt, step in enumerate((4, 200)[:times], start=1):
        runs.until(lambda n=attempt: (runs.folder / limited / "logs" / str(n) / "console.log").exists(), limited)
        runs.until_step(limited, step)
        runs.hit_rank(limited, 1, signal.SIGSTOP)
        runs.until(lambda n=attempt: batch_log(runs, limited).count("The run saves and leaves now") == n, limited)
        runs.hit_rank(limited, 1, signal.SIGCONT)
    assert runs.until_over(limited)["cause"] == "finished"
    assert runs.endings(limited) == [("time_limit", "requeue")] * times + [("finished", "stop")]
    assert runs.weights(limited, 400) == runs.weights(unlimited, 400)


def batch_log(runs: Runs, run: str) -> str:
    return "".join(path.read_text() for path in sorted((runs.folder / run / "logs").glob("slurm-*.log")))


@pytest.mark.parametrize("how", ["resubmit", pytest.param("array", marks=pytest.mark.slow)])
def test_other_ways_to_the_next_job(runs: Runs, how: str) -> None:
    """Where jobs may not be requeued: a new job, or the next task of an array; nothing is left in the queue."""
    run = f"by-{how}"
    job = runs.launch(
        run, *WORDS, "trainer.max_steps=400", f"launch.slurm.continue_by={how}", "launch.slurm.array_size=3"
    )
    runs.until_step(run, 12)
    task = next(event["job"] for event in runs.events(run) if event["event"] == "attempt")
    runs.slurm("scancel", "--signal=USR1", task)
    assert runs.until_over(run)["cause"] == "finished"
    assert runs.endings(run) == [("signal", {"resubmit": "resubmit", "array": "next_task"}[how]), ("finished", "stop")]
    runs.until(lambda: is_gone(runs, job), run, 60)


def test_the_run_belongs_to_its_queued_job(runs: Runs) -> None:
    """While the job waits, nobody else can start in the folder; enc says who has it."""
    job = runs.launch("waiting", *SHORT, 'launch.slurm.directives=["--hold"]')
    words = ["launch", "pretrain", "smoke", "trainer.output_dir=waiting", f"dataset.pre_tokenize_output={runs.store}"]
    again = runs.enc(*words, code=2)
    assert f"belongs to job {job}" in again.stderr
    runs.slurm("scancel", job)


def test_a_job_that_sbatch_refuses_leaves_nothing(runs: Runs) -> None:
    """What sbatch said is the message, and there is no run folder."""
    done = runs.enc("launch", "pretrain", "smoke", f"dataset.pre_tokenize_output={runs.store}",
                    "trainer.output_dir=refused", *SHORT, "--partition", "nowhere", "trainer.use_cpu=true",
                    code=2)  # fmt: skip
    assert "nowhere" in done.stderr or "partition" in done.stderr
    assert not (runs.folder / "refused").exists()


def test_a_job_runs_the_code_that_it_was_submitted_with(runs: Runs) -> None:
    """With launch.snapshot_code, from the copy in the run folder; here the copy is marked to see it."""
    words = ["trainer.max_steps=2", "launch.snapshot_code=true", 'launch.slurm.directives=["--hold"]']
    job = runs.launch("copied", *WORDS, *words)
    with (runs.folder / "copied" / "code" / "enc" / "__init__.py").open("a") as file:
        file.write('\n__version__ = "9.9-copy"\n')
    runs.slurm("scontrol", "release", job)
    assert runs.until_over("copied")["cause"] == "finished"
    record = json.loads((runs.folder / "copied" / "launches" / "1" / "launch.json").read_text())
    assert (record["enc"], record["job"]) == ("9.9-copy", job)
