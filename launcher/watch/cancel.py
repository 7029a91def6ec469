"""Stopping a run for good: first its folder says so, so that nothing starts it again, then its processes are told."""

import getpass
import os
import shlex
import signal
import socket
from collections.abc import Callable
from pathlib import Path

from enc.encoder.errors import RunError, UsageError
from enc.encoder.events import Event, append_event
from enc.launcher.backends.slurm import commands as slurm
from enc.launcher.run_folder.events import since_submitted
from enc.launcher.watch.run_state import ACTIVE, RunFiles, RunState

_GENTLE = "Its ranks save their state first; if they do not end, repeat this command."
_FORCED = "This time SLURM ends it: its ranks have the cluster's KillWait to save, 30 s by default."


def cancel_run(files: RunFiles, state: RunState, name: str, say: Callable[[str], None]) -> None:
    """Cancel a run that is active, and say what was done; `name` is the folder as a person would type it here.

    Raises UsageError when there is nothing to cancel or it cannot be done from here, RunError when SLURM did not obey.
    """
    if state.state not in (*ACTIVE, "unknown") and state.slurm_state != "PENDING":
        raise UsageError(f"{name} is not active: it is {state.state}. There is nothing to cancel.")
    if not files.jobs:
        _check_local(files, state)
    again = any(event["event"] == Event.CANCELLED for event in since_submitted(files.dir))
    record_cancelled(files.dir)
    if not files.jobs and files.lock.pid:
        _signal(files.lock.pid, signal.SIGTERM)
        say(f"Cancelled {name}: process {files.lock.pid} got SIGTERM. It saves its state first, then it ends.")
    else:
        jobs = _cancel_jobs(files, gently=not again)
        waits = state.slurm_state == "PENDING"
        how = "It was waiting in the queue." if waits else _FORCED if again else _GENTLE
        say(f"Cancelled {name}, job {', '.join(jobs)}. {how}")
    say(f"It will not be started again by itself. To go on with it: enc resume latest --run {shlex.quote(name)}")


def _check_local(files: RunFiles, state: RunState) -> None:
    lock = files.lock
    if state.alive is not True and lock.host not in (None, socket.gethostname()):
        raise UsageError(f"{files.dir} ran on {lock.host}: run `enc cancel` there. Nothing was changed.")
    if not lock.pid or state.alive is None:
        raise UsageError(f"Which process {files.dir} belongs to cannot be read from its lock. Nothing was changed.")
    if lock.host != socket.gethostname():
        raise UsageError(f"{files.dir} runs on {lock.host}: run `enc cancel` there. Nothing was changed.")
    if _has_open(lock.pid, files.dir / ".lock") is False:
        raise UsageError(
            f"Process {lock.pid}, which {files.dir}/.lock names, is not of the run any more, though the lock is still "
            "held: its last processes are ending. Look again with `enc status`. Nothing was changed."
        )
    _signal(lock.pid, 0)


def _has_open(pid: int, path: Path) -> bool | None:
    """Tell whether a process has a file open; None when that cannot be seen."""
    folder = Path("/proc") / str(pid) / "fd"
    if not folder.parent.exists():
        return False if Path("/proc/self").exists() else None
    try:
        target = path.stat()
        return any(os.path.samestat(entry.stat(), target) for entry in folder.iterdir() if entry.exists())
    except OSError:
        return None


def record_cancelled(run_dir: Path) -> None:
    """Note in the run folder that nobody is to start the run again."""
    try:
        append_event(run_dir, Event.CANCELLED, by=f"{_user()}@{socket.gethostname()}")
    except OSError as error:
        raise UsageError(
            f"{run_dir}/events.jsonl cannot be written ({error.strerror}), so {run_dir} was not cancelled."
        ) from None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return  # it ended meanwhile
    except PermissionError:
        raise UsageError(f"Process {pid} belongs to another user, who has to cancel the run.") from None


def _cancel_jobs(files: RunFiles, gently: bool) -> list[str]:
    """Cancel the jobs of a run that are in the queue: the newest one, and older ones that have not ended yet.

    `gently` only tells the batch process of a running job, which ends it when the ranks have saved, however long that
    takes. The id of an array means all of its tasks.
    """
    newest = files.jobs[0]
    try:
        known = slurm.find_jobs(files.jobs, timeout_s=10)
        jobs = [job for job, found in known.items() if not found.is_over] or [newest]
        for job in jobs:
            if gently and job in known and known[job].state == "RUNNING":
                slurm.cancel("--signal=TERM", "--batch", known[job].id)
                if known[job].id != job:
                    slurm.cancel("--state=PENDING", job)  # the other tasks of an array
            else:
                slurm.cancel(job)
    except UsageError as error:
        raise RunError(
            f"{files.dir} is marked as cancelled and will not be started again, but its job {newest} could not be "
            f"cancelled. {error} Repeat `enc cancel`, or run `scancel {newest}`."
        ) from None
    return jobs
