"""`enc status`, `enc cancel` and their kin on a real SLURM: jobs of run folders that were made by hand."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cluster_slurm import Slurm
from running import Enc


class Job:
    """A run folder whose job sleeps where a supervisor would be."""

    def __init__(self, slurm: Slurm, folder: Path, environment: dict[str, str], *options: str) -> None:
        self.slurm, self.folder, self.run = slurm, folder, folder / "runs" / "my"
        self.enc = Enc(folder, {**environment, **slurm.variables})
        (self.run / "logs").mkdir(parents=True)
        (self.run / "config.yaml").write_text("trainer:\n  max_steps: 100\n")
        script = self.run / "job.sbatch"
        script.write_text(f"#!/bin/bash\n#SBATCH --output={self.run}/logs/slurm-%j.log\necho began\nexec sleep 300\n")
        words = slurm("sbatch", "--parsable", "--time=5", f"--chdir={folder}", *options, str(script))
        self.id = words.strip()
        self.tell("submitted", job=self.id, nodes=1, nproc_per_node=1, script="job.sbatch", after=None)

    def tell(self, name: str, **details: Any) -> None:
        """Append an event."""
        record = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": name, **details}
        with (self.run / "events.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    def state(self, run: str | None = None) -> dict[str, Any]:
        return json.loads(self.enc("status", run or "runs/my", "--json").stdout)

    def until(self, state: str) -> dict[str, Any]:
        """Wait for a state and return all that is known then."""
        limit = time.monotonic() + 60
        while (found := self.state())["state"] != state:
            assert time.monotonic() < limit, found
            time.sleep(0.2)
        return found


@pytest.fixture
def job(slurm: Slurm, tmp_path: Path, environment: dict[str, str]) -> Callable[..., Job]:
    def start(*options: str) -> Job:
        return Job(slurm, tmp_path, environment, *options)

    return start


def test_queued_running_cancelled(job: Callable[..., Job]) -> None:
    """A held job is queued; released it starts, then runs; cancelled it stops, and its folder says so."""
    run = job("--hold")
    found = run.until("queued")
    assert (found["job"], found["slurm_state"], found["alive"], found["total_steps"]) == (run.id, "PENDING", False, 100)
    assert "PENDING (JobHeldUser)" in run.enc("status").stdout

    run.slurm("scontrol", "release", run.id)
    assert run.until("starting")["slurm_state"] == "RUNNING"
    run.tell("attempt", attempt=1, job=run.id, nodes=["n1"], restart_count=0, from_step=0)
    run.tell("started", step=0, world_size=1)
    found = run.until("running")
    assert found["nodes"] == ["n1"]
    assert found["slurm_time_limit"] == "5:00"
    row = run.enc("ls").stdout.splitlines()[1].split()
    assert row[:3] + row[-1:] == ["runs/my", "running", "0/100", run.id]

    said = run.enc("cancel", "runs/my").stderr
    assert f"job {run.id}" in said
    assert "enc resume latest --run runs/my" in said
    events = run.enc.events("runs/my")
    assert events[-1]["event"] == "cancelled"
    found = run.until("cancelled")
    assert found["why"].startswith("Cancelled by ")
    ended = run.slurm("squeue", "-h", "-t", "all", "-j", run.id, "-o", "%T").split()
    assert set(ended) <= {"FAILED", "CANCELLED", "COMPLETING"}  # the batch process here is a sleep, which TERM kills
    assert "not active: it is cancelled" in run.enc("cancel", "runs/my", code=2).stderr


def test_a_queued_job_is_cancelled(job: Callable[..., Job]) -> None:
    """One question tells it from a run whose job SLURM has forgotten; the only active run needs no name."""
    run = job("--hold")
    run.until("queued")
    gone = run.folder / "runs" / "gone"
    gone.mkdir()
    (gone / "config.yaml").write_text("trainer:\n  max_steps: 100\n")
    (gone / "events.jsonl").write_text('{"event": "submitted", "job": "999999"}\n')
    found = {Path(state["run"]).name: state["state"] for state in json.loads(run.enc("ls", "--json").stdout)}
    assert found == {"my": "queued", "gone": "lost"}
    assert "waiting in the queue" in run.enc("cancel").stderr
    assert run.state()["state"] == "cancelled"


def test_a_run_is_found_by_its_job(job: Callable[..., Job], tmp_path_factory: pytest.TempPathFactory) -> None:
    """By the events of the runs here, and elsewhere by what SLURM knows of the job."""
    run = job("--hold")
    assert run.state(run.id)["run"] == str(run.run)
    elsewhere = Enc(tmp_path_factory.mktemp("elsewhere"), run.enc.environment)
    assert json.loads(elsewhere("status", run.id, "--json").stdout)["run"] == str(run.run)
    assert "SLURM knows no run folder of job 999999" in elsewhere("status", "999999", code=2).stderr
    run.slurm("scancel", run.id)


def test_a_job_that_somebody_else_cancelled(job: Callable[..., Job]) -> None:
    """Without an event, SLURM's word tells that the run is over."""
    run = job()
    run.until("starting")
    run.tell("attempt", attempt=1, job=run.id, nodes=["n1"], restart_count=0, from_step=0)
    run.slurm("scancel", run.id)
    assert run.until("cancelled")["detail"] == "SLURM says that its job was cancelled."


def test_a_requeued_job_waits_again(job: Callable[..., Job]) -> None:
    """After SLURM itself requeued a running job, the run is queued again, whatever its events say."""
    run = job("--requeue")
    run.until("starting")
    run.tell("attempt", attempt=1, job=run.id, nodes=["n1"], restart_count=0, from_step=0)
    run.tell("started", step=0, world_size=1)
    run.slurm("scontrol", "requeuehold", run.id)
    assert run.until("requeued")["detail"] == "SLURM put its job back into the queue."
    run.slurm("scancel", run.id)


def test_an_array_is_one_run(job: Callable[..., Job]) -> None:
    """Between two tasks the run is queued again, and cancelling it cancels all tasks."""
    run = job("--array=1-5%1")
    run.until("starting")
    task = run.slurm("squeue", "-h", "-t", "RUNNING", "-j", run.id, "-o", "%A").strip()
    run.tell("attempt", attempt=1, job=task, nodes=["n1"], restart_count=0, from_step=0)
    run.tell("attempt_ended", attempt=1, cause="time_limit", step=7, detail="Time is up.", decision="next_task",
             reason="The next task goes on.")  # fmt: skip
    run.slurm("scancel", f"{run.id}_1")
    limit = time.monotonic() + 60
    while run.state()["state"] not in ("requeued", "restarting"):
        assert time.monotonic() < limit, run.state()
    found = run.state()
    assert found["restarts"] == {"time_limit": 1}
    run.enc("cancel")
    limit = time.monotonic() + 30
    while set(run.slurm("squeue", "-h", "-r", "-t", "all", "-j", run.id, "-o", "%T").split()) & {"PENDING", "RUNNING"}:
        assert time.monotonic() < limit
        time.sleep(3)
        run.enc("cancel", code=None)  # the second one forces it; a task that just starts may have missed the first


def test_batch_log_and_follow(job: Callable[..., Job]) -> None:
    """Before rank 0 speaks its batch log is shown; -f goes on with the attempts' logs and ends with the run."""
    run = job()
    run.until("starting")
    done = run.enc("logs")
    assert done.stdout == "began\n"
    assert "Rank 0 has said nothing yet" in done.stderr
    follower = run.enc.start("logs", "-f")
    shown = run.folder / "background.log"
    while "began" not in shown.read_text():
        assert follower.poll() is None, shown.read_text()
        time.sleep(0.1)
    for attempt in (1, 2):
        run.tell("attempt", attempt=attempt, job=run.id, nodes=["n1"], restart_count=0, from_step=0)
        folder = run.run / "logs" / str(attempt)
        folder.mkdir()
        (folder / "console.log").write_text(f"attempt {attempt} speaks\n")
        time.sleep(1.5)
    run.enc("cancel")
    try:
        assert follower.wait(60) == 0
    finally:
        follower.kill()
    lines = [line for line in shown.read_text().splitlines() if "speaks" in line or line == "began"]
    assert lines == ["began", "attempt 1 speaks", "attempt 2 speaks"]
    assert run.enc("logs", "--batch").stdout.startswith("began\n")


def test_slurm_that_does_not_answer(job: Callable[..., Job]) -> None:
    """What the files say is shown with a note, soon."""
    run = job("--hold")
    lost = Enc(run.folder, {**run.enc.environment, "SLURM_CONF": str(run.folder / "none.conf")})
    began = time.monotonic()
    text = lost("status").stdout
    assert "unknown. Last known to be queued; SLURM could not be asked." in text
    assert "this is what the files say" in text
    assert time.monotonic() - began < 8
    failed = lost("cancel", "runs/my", code=3).stderr
    assert "marked as cancelled" in failed
    assert f"scancel {run.id}" in failed
    run.slurm("scancel", run.id)
