"""A SLURM job from the inside: the ranks are one srun step, the scheduler is asked and told by its commands."""

import contextlib
import functools
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from enc.encoder.config.launch import SlurmConfig
from enc.encoder.config.load import load_run
from enc.encoder.errors import UsageError
from enc.encoder.heartbeat import read_rank_files
from enc.launcher.backends.slurm import commands as slurm
from enc.launcher.backends.slurm import next_job
from enc.launcher.machine.ports import free_port

_ASK_EVERY_S = 60.0
_PROBE_S = 90.0
_READY_S = 60.0  # until then a signal waits for tasks that have not said a word
_WARNING_SLACK_S = 65.0  # SLURM looks at time limits once a minute
# slurmstepd writes this into the batch log. The states that squeue shows do not tell a scancel from a preemption while
# the job completes. "STEP" lines are not looked at: killing the ranks of a hang makes one as well.
_WORDS = re.compile(r"\*\*\* JOB \S+ ON \S+ CANCELLED AT \S+(?: DUE TO ([A-Z ]+?))? \*\*\*")
# srun writes this of a task that ended by itself; the ones that it then ends are "Terminated" or "Killed". A rank that
# fails later has said so in its file.
_EXITED = re.compile(r"srun: error: \S+: tasks? ([\d,-]+): (Exited with exit code \d+)")
_CAUSES = {None: "cancelled", "TIME LIMIT": "time_limit", "PREEMPTION": "preempted", "JOB REQUEUE": "requeued"}


class SlurmHost:
    """The allocation that this process was started in."""

    restarts = True

    def __init__(self, run_dir: Path, command: list[str], variables: Mapping[str, str]) -> None:
        """Read the job from SLURM's variables; `command` is the srun line that starts the ranks."""
        self.run_dir, self.command = run_dir, command
        self.job: str = variables["SLURM_JOB_ID"]
        self.nodes = slurm.node_names(variables["SLURM_JOB_NODELIST"])
        self.restart_count = int(variables.get("SLURM_RESTART_COUNT", 0))
        self.address = slurm.node_address(variables.get("SLURMD_NODENAME", "")) or socket.gethostname()
        self.log = Path(os.readlink("/proc/self/fd/2"))
        self.read_from = self.attempt_from = self._log_size()
        self.srun: subprocess.Popen[bytes] | None = None
        self.attempt, self.world_size, self.started_at = 0, 0, 0.0
        self.signal_waits = False
        self.asked_at = -_ASK_EVERY_S
        self.end: float | None = None

    def start(self, attempt: int, world_size: int) -> None:
        self.attempt_from = self._log_size()
        self.attempt, self.world_size, self.started_at = attempt, world_size, time.monotonic()
        self.signal_waits = False
        place = {
            "ENC_ATTEMPT": str(attempt), "ENC_MASTER_ADDR": self.address, "ENC_MASTER_PORT": str(free_port()),
            "ENC_SUPERVISOR_PID": str(os.getpid()), "ENC_SUPERVISOR_HOST": socket.gethostname(),
        }  # fmt: skip
        self.srun = subprocess.Popen(self.command, env={**os.environ, **place}, stdin=subprocess.DEVNULL)

    def running(self) -> bool:
        if self.signal_waits and self._tasks_are_ready():
            self._signal_tasks()
        return self.srun is not None and self.srun.poll() is None

    def exit_codes(self) -> dict[int, int | None]:
        return {}  # srun says one for all; each task writes its own into the rank's file

    def signal(self, number: int) -> None:
        """Pass a signal on to all tasks, once all have said a word: one that has only just begun would die of it."""
        self.signal_waits = True

    def _tasks_are_ready(self) -> bool:
        if time.monotonic() - self.started_at > _READY_S:
            return True
        return len(read_rank_files(self.run_dir, self.attempt)) == self.world_size

    def _signal_tasks(self) -> None:
        """Send SIGUSR1 through srun, which would itself kill the tasks at a SIGTERM."""
        self.signal_waits = False
        if self.srun is not None and self.srun.poll() is None:
            self.srun.send_signal(signal.SIGUSR1)

    def kill(self) -> None:
        """Kill all steps, or an srun that waits for its step; when SLURM does not answer, the supervisor asks again."""
        with contextlib.suppress(UsageError):
            steps = slurm.steps(self.job)
            for step in steps:
                slurm.cancel("--signal=KILL", step)
            if not steps and self.srun is not None:
                self.srun.kill()

    def end_time(self) -> float | None:
        now = time.monotonic()
        if now - self.asked_at >= _ASK_EVERY_S:
            self.asked_at = now
            try:
                job = slurm.find_job(self.job, timeout_s=10)
                self.end = slurm.unix_time(job.end) if job is not None else self.end
            except UsageError:
                pass  # the controller is busy; what it said last holds
        return self.end

    def is_warning(self, number: int) -> bool:
        end = self.end_time()
        return (
            number == signal.SIGUSR1
            and end is not None
            and end - time.time() < self._settings.signal_s + _WARNING_SLACK_S
        )

    def interruption(self) -> str | None:
        """Read what slurmstepd wrote about the job since this process began."""
        words = _WORDS.findall(self._log_since(self.read_from))
        cause = _CAUSES.get(words[-1] or None, "preempted") if words else None
        return None if cause == "cancelled" and self._still_runs() else cause

    def _still_runs(self) -> bool:
        """Tell whether the job was not cancelled after all: a TERM to its batch process alone is logged the same."""
        try:
            job = slurm.find_job(self.job, timeout_s=10)
        except UsageError:
            return False
        return job is not None and job.state == "RUNNING"

    def never_started(self) -> dict[int, str]:
        found = _EXITED.findall(self._log_since(self.attempt_from))
        return {rank: text[0].lower() + text[1:] for ranks, text in found for rank in expand(ranks)}

    def _log_since(self, place: int) -> str:
        try:
            with self.log.open("rb") as file:
                file.seek(place)
                return file.read().decode(errors="replace")
        except OSError:
            return ""

    def _log_size(self) -> int:
        return self.log.stat().st_size if self.log.is_file() else 0

    def unhealthy(self) -> str | None:
        """Start nothing on every node and see whether it works: a dead node must not cost another start."""
        job = slurm.patiently(lambda: slurm.find_job(self.job))
        if job is None or job.state != "RUNNING":
            return f"the job is {job.state if job else 'gone'}."
        count = len(self.nodes)
        words = f"srun --overlap --nodes={count} --ntasks={count} --ntasks-per-node=1 --cpus-per-task=1 --gpus=0 true"
        try:
            done = subprocess.run(words.split(), capture_output=True, text=True, timeout=_PROBE_S, check=False)
        except subprocess.TimeoutExpired:
            return f"a node does not answer within {_PROBE_S:.0f} s."
        return None if done.returncode == 0 else f"a node does not start processes ({' '.join(done.stderr.split())})."

    @functools.cached_property
    def _settings(self) -> SlurmConfig:
        return load_run(self.run_dir).launch.slurm

    def next_job_by(self, must_be_new: bool) -> str:
        return next_job.kind(self._settings, must_be_new)

    def next_job(self, must_be_new: bool) -> None:
        if next_job.request(self.run_dir, self.job, must_be_new) == "requeue":
            signal.sigtimedwait([signal.SIGTERM], 120)  # SLURM ends this process

    def drop_next_jobs(self) -> None:
        with contextlib.suppress(UsageError):  # a task that starts all the same sees that there is nothing to do
            next_job.drop_rest_of_array()


def expand(ranks: str) -> list[int]:
    """Return the numbers that srun means by e.g. `1,3-5`."""
    parts = (part.partition("-") for part in ranks.split(","))
    return [rank for first, _, last in parts for rank in range(int(first), int(last or first) + 1)]
