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
from enc.launcher.backends.registry import owner_of
from enc.launcher.run_folder.events import since_submitted
from enc.launcher.watch.run_state import ACTIVE, RunFiles, RunState


def cancel_run(files: RunFiles, state: RunState, name: str, say: Callable[[str], None]) -> None:
    """Cancel a run that is active, and say what was done; `name` is the folder as a person would type it here.

    Raises UsageError when there is nothing to cancel or it cannot be done from here, RunError when a scheduler did not
    obey.
    """
    if state.state not in (*ACTIVE, "unknown") and not state.job_waits:
        raise UsageError(f"{name} is not active: it is {state.state}. There is nothing to cancel.")
    if not files.jobs:
        _check_local(files, state)
    again = any(event["event"] == Event.CANCELLED for event in since_submitted(files.dir))
    record_cancelled(files.dir)
    if not files.jobs and files.lock.pid:
        _signal(files.lock.pid, signal.SIGTERM)
        say(f"Cancelled {name}: process {files.lock.pid} got SIGTERM. It saves its state first, then it ends.")
    else:
        jobs, meaning = _cancel_jobs(files, gently=not again)
        say(f"Cancelled {name}, job {', '.join(jobs)}. {meaning}")
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


def _cancel_jobs(files: RunFiles, gently: bool) -> tuple[list[str], str]:
    """Cancel the jobs of a run that are not over; return them, and what that means for the run."""
    backend = owner_of(files.jobs[0])
    if backend is None:
        raise RunError(f"{files.dir} is marked as cancelled, but nobody here knows of its job {files.jobs[0]}.")
    try:
        return backend.cancel([job for job in files.jobs if backend.owns(job)], gently)
    except UsageError as error:
        raise RunError(
            f"{files.dir} is marked as cancelled and will not be started again, but its job {files.jobs[0]} could not "
            f"be cancelled. {error}"
        ) from None
