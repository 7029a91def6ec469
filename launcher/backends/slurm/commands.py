"""Talking to SLURM: sbatch, squeue, scontrol, scancel. No torch."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from enc.encoder.errors import UsageError
from enc.launcher.run_folder import job as run_job

_TIMEOUT_S = 60
_PATIENCE_S, _PAUSE_S = 1800.0, 5.0
# What SLURM's commands say when the controller is down, restarts, or is too busy to listen.
_NO_ANSWER = re.compile(
    r"unable to contact slurm controller|timed out|zero bytes were transmitted|connection (refused|reset)"
    r"|standby mode|temporarily unable",
    re.IGNORECASE,
)
_ALIVE = ("PENDING", "RUNNING", "SUSPENDED", "CONFIGURING", "REQUEUED", "COMPLETING", "RESIZING")
_PHASES: dict[str, run_job.Phase] = {"PENDING": "waiting", "COMPLETING": "ending"}
_FIELDS = "%i|%T|%r|%M|%l|%e|%N|%D"


T = TypeVar("T")


class NoAnswer(UsageError):
    """The controller did not answer; it may do so later."""


@dataclass(frozen=True)
class Job:
    """What SLURM says of a job; texts are SLURM's own words."""

    id: str
    state: str  # PENDING, RUNNING, COMPLETING, CANCELLED, ...
    reason: str
    elapsed: str
    time_limit: str
    end: str  # 2026-11-22T13:00:00, or N/A
    nodelist: str
    num_nodes: int

    @property
    def is_over(self) -> bool:
        """Whether the job will not run any more."""
        return self.state not in _ALIVE

    def neutral(self) -> run_job.Job:
        """Return the job for those who do not know SLURM."""
        return run_job.Job(
            scheduler="SLURM", id=self.id, phase="over" if self.is_over else _PHASES.get(self.state, "running"),
            state=self.state, was_cancelled=self.state == "CANCELLED", reason=self.reason, elapsed=self.elapsed,
            time_limit=self.time_limit,
        )  # fmt: skip


@dataclass(frozen=True)
class Partition:
    """A partition; texts are SLURM's own words."""

    name: str
    is_default: bool
    state: str  # up, down, drain, inact
    time_limit: str
    idle_nodes: int
    num_nodes: int


def patiently(ask: Callable[[], T]) -> T:
    """Ask SLURM until it answers, for half an hour: nobody starts a run again because a controller was restarted."""
    give_up = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return ask()
        except NoAnswer:
            if time.monotonic() > give_up:
                raise
            time.sleep(_PAUSE_S)


def is_installed() -> bool:
    """Tell whether SLURM's commands are there; it says nothing about a controller that answers."""
    return shutil.which("sbatch") is not None


def outer_environment() -> dict[str, str]:
    """Return this process's environment without what an allocation left in it, which would change a new job."""
    kept = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
    return {
        key: value
        for key, value in os.environ.items()
        if key in kept or not key.startswith(("SLURM_", "SBATCH_", "SRUN_", "PMI", "ENC_"))
    }


def submit(script: Path, *options: str) -> str:
    """Submit a script and return the job's id. Raises UsageError with what sbatch said."""
    words = ["sbatch", "--parsable", *options, str(script)]
    return _run(words, f"sbatch refused {script}").strip().partition(";")[0]


def find_job(job: str, timeout_s: float = _TIMEOUT_S) -> Job | None:
    """Return what SLURM knows of a job; None when it does not know it. Raises UsageError when it does not answer."""
    return find_jobs([job], timeout_s).get(job)


def find_jobs(jobs: list[str], timeout_s: float) -> dict[str, Job]:
    """Return what SLURM knows of several jobs, by the ids asked for, in one call; unknown ones are left out.

    Of a job array, asked for by its own id, the running task is returned, else a waiting one. Raises UsageError when
    SLURM does not answer in time.
    """
    asked = [job for job in dict.fromkeys(jobs) if re.fullmatch("[0-9]+(_[0-9]+)?", job)]
    if not asked:
        return {}
    try:
        words = ["squeue", "-h", "-r", "-t", "all", "-j", ",".join(asked), "-o", f"{_FIELDS}|%A|%F"]
        output = _run(words, "squeue failed", timeout_s)
    except UsageError as error:
        if "Invalid job id" in str(error):
            return {}
        raise
    found: dict[str, Job] = {}
    for line in output.splitlines():
        *fields, task_id, array_id = line.split("|")
        id, state, reason, elapsed, limit, end, nodelist, count = fields
        job = Job(id, state, reason, elapsed, limit, end, nodelist, int(count) if count.isdigit() else 0)
        for name in {id, task_id, array_id} & set(asked):
            if name not in found or _urgency(job) < _urgency(found[name]):
                found[name] = job
    return found


def _urgency(job: Job) -> int:
    return 2 if job.is_over else 1 if job.state == "PENDING" else 0


def job_paths(job: str, timeout_s: float) -> list[Path]:
    """Return the script, output file and working folder of a job, as far as SLURM knows them."""
    try:
        output = _run(["scontrol", "show", "job", "-o", job], "scontrol failed", timeout_s)
    except UsageError as error:
        if "Invalid job id" in str(error):
            return []
        raise
    found = (re.search(rf"\b{key}=(\S+)", output) for key in ("Command", "StdOut", "WorkDir"))
    return [Path(match[1]) for match in found if match]


def cancel(*words: str) -> None:
    """Run scancel. Raises UsageError with what it said.

    For a job that has just ended it says nothing and ends with 229 (ESLURM_ALREADY_DONE): that is what was wanted.
    """
    _run(["scancel", *words], "scancel failed", fine=(0, 229))


def requeue(job: str) -> None:
    """Put a job back into the queue; it ends at once. Raises UsageError when SLURM refuses."""
    _run(["scontrol", "requeue", job], f"SLURM does not requeue job {job}")


def gpus_per_node(partition: str | None) -> int | None:
    """Return the GPUs of a node of a partition (by default the default one), the least if they differ.

    None when SLURM does not answer. Raises UsageError when there is no such partition.
    """
    try:
        output = _run(["sinfo", "-h", "-o", "%P|%G", *(["-p", partition] if partition else [])], "sinfo failed", 20)
    except UsageError:
        return None
    lines = [line.split("|") for line in output.splitlines()]
    lines = [line for line in lines if partition or line[0].endswith("*")] or lines
    if not lines:
        raise UsageError(f"SLURM has no partition {partition}; `sinfo -s` lists them.")
    return min(_gpus_of(gres) for _, gres in lines)


def _gpus_of(gres: str) -> int:
    """Count the GPUs in a node's generic resources, e.g. `gpu:h100:8(S:0-1),nvme:1`."""
    counts = (re.match(r"gpu(?::[^:(]+)?:(\d+)", word) for word in gres.split(","))
    return sum(int(count[1]) for count in counts if count)


def steps(job: str) -> list[str]:
    """Return the ids of a job's srun steps, e.g. `12.0`; not those of the batch script."""
    lines = _run(["squeue", "-h", "-s", "-j", job, "-o", "%i"], "squeue failed").split()
    return [step for step in lines if step.rpartition(".")[2].isdigit()]


def node_address(name: str) -> str | None:
    """Return the address at which SLURM itself reaches a node, or None."""
    try:
        words = _run(["scontrol", "show", "node", name], "scontrol failed").split() if name else []
    except UsageError:
        return None
    return next((word.partition("=")[2] for word in words if word.startswith("NodeAddr=")), None)


def unix_time(text: str) -> float | None:
    """Return the time of `2026-11-22T13:00:00` (this machine's zone) in Unix seconds; None for N/A and the like."""
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return None


def node_names(nodelist: str) -> list[str]:
    """Expand SLURM's short form of node names, e.g. `n[1-3]`."""
    return _run(["scontrol", "show", "hostnames", nodelist], "scontrol failed").split()


def partitions(timeout_s: float = _TIMEOUT_S) -> list[Partition]:
    """Return the partitions that this user sees. Raises UsageError when SLURM does not answer in time."""
    lines = _run(["sinfo", "-h", "-o", "%P|%a|%l|%F"], "sinfo failed", timeout_s).splitlines()
    rows = [line.split("|") for line in lines if line.count("|") == 3]
    return [
        Partition(name.rstrip("*"), name.endswith("*"), state, limit, *_counts(nodes))
        for name, state, limit, nodes in rows
    ]


def _counts(nodes: str) -> tuple[int, int]:
    """Return idle and all nodes of SLURM's `allocated/idle/other/total`, in which thousands can be written as `1K`."""
    numbers = [int(float(n[:-1]) * 1000) if n.endswith("K") else int(n) for n in nodes.split("/")]
    return numbers[1], numbers[3]


def _run(words: list[str], what: str, timeout_s: float = _TIMEOUT_S, fine: tuple[int, ...] = (0,)) -> str:
    try:
        done = subprocess.run(
            words, env=outer_environment(), capture_output=True, text=True, check=False, timeout=timeout_s
        )
    except FileNotFoundError:
        raise UsageError(f"{words[0]} is not installed here: run this on a machine of the SLURM cluster.") from None
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"SLURM did not answer {words[0]} within {timeout_s:g} s. Try again later.") from None
    if done.returncode not in fine:
        answer = " ".join(done.stderr.split()) or f"{words[0]} ended with code {done.returncode}"
        raise (NoAnswer if _NO_ANSWER.search(answer) else UsageError)(f"{what}: {answer}")
    return done.stdout
