"""The run folder: its lock, its launch records, and finding runs on disk.

<output_dir>/ config.yaml  launches/<n>/  logs/<n>/  metrics.jsonl  events.jsonl  tensorboard/  checkpoints/
"""

import contextlib
import errno
import fcntl
import json
import os
import shlex
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from enc import __version__
from enc.encoder.checkpoints.folder import list_checkpoints
from enc.encoder.engine.settings import DEEPSPEED_FILE, FSDP_FILE
from enc.encoder.errors import UsageError
from enc.launcher import slurm
from enc.launcher.run_files import newest_attempt, objects, tail

_COMPLETING_S = 45.0  # SLURM's KillWait, and some
_LOCK_PATIENCE_S = 3.0  # batch workers of a killed run outlive it by a moment


class RunLock:
    """Exclusive use of a run folder; inherited by the processes started under it, released when the last one ends."""

    def __init__(self, run_dir: Path, patience_s: float = _LOCK_PATIENCE_S, job: str | None = None) -> None:
        """Take the lock, making the folder if need be; `job` is the SLURM job that this process belongs to.

        Raises UsageError when it is taken, by a process or by a job that is queued, or when it cannot be written.
        """
        self.run_dir = run_dir
        self.created = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
        give_up = time.monotonic() + patience_s
        while not self._try():
            if time.monotonic() > give_up:
                raise UsageError(self._taken())
            time.sleep(0.1)
        if job is None:
            self._refuse_queued_job()
        self.belongs_to(job)
        os.set_inheritable(self.file.fileno(), True)

    def belongs_to(self, job: str | None) -> None:
        """Name this process as the owner, and the job that has the run, which keeps it when this process has ended."""
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "job": job}
        self.file.truncate(0)
        self.file.write(json.dumps(owner))
        self.file.flush()

    def _refuse_queued_job(self) -> None:
        """Raise UsageError when SLURM still has a job of the run: the last one, or one that follows it.

        One that is just completing is waited for.
        """
        told = [event.get("job") for event in since_submitted(self.run_dir)]
        jobs = [job for job in dict.fromkeys([self._owner().get("job"), *told]) if job]
        give_up = time.monotonic() + _COMPLETING_S
        while alive := _jobs_alive(jobs):
            if {found.state for found in alive.values()} == {"COMPLETING"} and time.monotonic() < give_up:
                time.sleep(0.5)
                continue
            job, found = next(iter(alive.items()))
            self.file.close()
            raise UsageError(
                f"The run folder {self.run_dir} belongs to job {job}, which is {found.state.lower()}. Watch it with "
                f"`enc status {self.run_dir}`, end it with `enc cancel {self.run_dir}`, or choose another "
                "trainer.output_dir."
            )

    def _owner(self) -> dict[str, Any]:
        self.file.seek(0)
        try:
            owner = json.loads(self.file.read())
            return owner if isinstance(owner, dict) else {}
        except ValueError:
            return {}

    def _try(self) -> bool:
        """Lock the file once; a file that its last owner removed meanwhile does not count."""
        path = self.run_dir / ".lock"
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self.file = path.open("a+")
        except OSError as error:
            self._remove_created()
            raise UsageError(
                f"The run folder {self.run_dir} cannot be written ({error.strerror}). Choose another "
                "trainer.output_dir or mend its permissions."
            ) from None
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return os.fstat(self.file.fileno()).st_ino == path.stat().st_ino
        except (BlockingIOError, FileNotFoundError):
            return False

    def _taken(self) -> str:
        owner = self._owner()
        who = f"process {owner['pid']} on {owner['host']}" if {"pid", "host"} <= owner.keys() else "another process"
        who += f", job {owner['job']}" if owner.get("job") else ""
        return (
            f"The run folder {self.run_dir} is in use by {who}. Two runs in one folder would overwrite each other's "
            "checkpoints: stop that one, or choose another trainer.output_dir."
        )

    def release(self, remove_if_created: bool = False) -> None:
        """Give the lock back; with `remove_if_created` also remove folders made for it that hold nothing else."""
        if remove_if_created and self.created and [p.name for p in self.run_dir.iterdir()] == [".lock"]:
            (self.run_dir / ".lock").unlink()
            self._remove_created()
        self.file.close()

    def _remove_created(self) -> None:
        with contextlib.suppress(OSError):  # somebody else has put something there
            for folder in self.created:
                folder.rmdir()


def _jobs_alive(jobs: list[str]) -> dict[str, slurm.Job]:
    known = slurm.find_jobs(jobs, 60) if jobs and slurm.is_installed() else {}
    return {job: found for job, found in known.items() if not found.is_over}


def refuse_older_run(run_dir: Path) -> None:
    """Raise UsageError when the folder holds checkpoints, so that no older run is overwritten."""
    found = list_checkpoints(run_dir)
    if found:
        raise UsageError(
            f"{run_dir} already holds a run with a checkpoint of step {found[-1].name}. To go on with it: `enc resume "
            f"latest --run {run_dir}`. For a new run choose another trainer.output_dir, or set "
            "trainer.overwrite_output_dir true, which moves the old run aside."
        )


def move_aside(run_dir: Path, say: Callable[[str], None]) -> Path | None:
    """Move an older run's files to `<run_dir>.replaced-<n>` and return that folder; None when there is no such run."""
    if not list_checkpoints(run_dir):
        return None
    number = 1
    while (target := run_dir.with_name(f"{run_dir.name}.replaced-{number}")).exists():
        number += 1
    target.mkdir()
    for path in run_dir.iterdir():
        if path.name != ".lock":
            path.rename(target / path.name)
    say(f"The run that was in {run_dir} is now in {target}.")
    return target


def move_back(target: Path, run_dir: Path, say: Callable[[str], None]) -> None:
    """Undo `move_aside`, for a run that did not come to be."""
    for path in target.iterdir():
        path.rename(run_dir / path.name)
    target.rmdir()
    say(f"The older run is back in {run_dir}.")


def record_launch(
    run_dir: Path, files: dict[str, str], command: list[str], plan: dict[str, Any], job: str | None = None
) -> int:
    """Write the rendered files into the run folder and into a new `launches/<n>/`; return n."""
    attempt = (newest_attempt(run_dir) or 0) + 1
    folder = run_dir / "launches" / str(attempt)
    folder.mkdir(parents=True)
    for name in {DEEPSPEED_FILE, FSDP_FILE} - set(files):  # of an earlier launch with another engine
        (run_dir / name).unlink(missing_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
        write_atomically(run_dir / name, text)
    record = {
        "attempt": attempt, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "host": socket.gethostname(),
        "command": shlex.join(command), "enc": __version__, "git": git_state(Path.cwd()), "plan": plan,
        "job": job,
    }  # fmt: skip
    (folder / "launch.json").write_text(json.dumps(record, indent=1) + "\n")
    installed = sorted({f"{d.metadata['Name']}=={d.version}" for d in distributions()}, key=str.lower)
    (folder / "environment.txt").write_text("\n".join(installed) + "\n")
    return attempt


def append_event(run_dir: Path, name: str, **details: Any) -> None:
    """Append an event to a run's `events.jsonl`, in one write: the trainer may append at the same time."""
    record = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": name, **details}
    path = run_dir / "events.jsonl"
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        broken = tail(path, 1) not in (b"", b"\n")  # a line that was half written when its process was killed
        line = f"{chr(10) * broken}{json.dumps(record)}\n".encode()
        if os.write(file, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(file)


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """Return a run's events, oldest first; lines that are not whole are left out. A file that cannot be read raises."""
    try:
        content = (run_dir / "events.jsonl").read_bytes()
    except FileNotFoundError:
        return []
    return [event for event in objects(content) if "event" in event]


_BEGINNINGS = ("submitted", "rendered", "rehearsed")


def since_submitted(run_dir: Path) -> list[dict[str, Any]]:
    """Return the events since a person last asked for a run."""
    events = read_events(run_dir)
    return events[max((i for i, event in enumerate(events) if event["event"] in _BEGINNINGS), default=0) :]


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file in one go."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return the commit of the repository that holds `folder` and whether files differ from it; None outside one."""
    try:
        command = ["git", "-C", str(folder), "status", "--porcelain=v2", "--branch"]
        output = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    lines = output.splitlines()
    commit = next((line.split()[2] for line in lines if line.startswith("# branch.oid")), None)
    return {"commit": commit, "changed_files": sum(not line.startswith("#") for line in lines)}


_RUN_FILES = ("events.jsonl", "metrics.jsonl", "launches")
_NO_RUNS_BELOW = ("checkpoints", "launches", "logs", "tensorboard", "wandb")


def find_runs(folder: Path, depth: int = 3) -> list[Path]:
    """Return the run folders at or below `folder`, the one with the newest launch or event first.

    Folders that may not be read are passed over.
    """
    return [Path(name) for _, name in sorted(_walk_runs(str(folder), depth), reverse=True)]


def _walk_runs(folder: str, depth: int) -> Iterator[tuple[float, str]]:
    """Yield (time of the newest launch or event, path) of every run; a run has a config and has written something."""
    try:
        entries = {entry.name: entry for entry in os.scandir(folder)}
    except OSError:
        return
    if "config.yaml" in entries and any(name in entries for name in _RUN_FILES):
        with contextlib.suppress(OSError):
            told = [entries[name].stat().st_mtime for name in ("config.yaml", "events.jsonl") if name in entries]
            yield max(told), folder
    for name, entry in entries.items():
        if depth > 0 and not name.startswith(".") and name not in _NO_RUNS_BELOW and _is_folder(entry):
            yield from _walk_runs(entry.path, depth - 1)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def find_run(run: str | None) -> Path:
    """Return the given run folder, or the newest one below the working directory. Raises UsageError without one."""
    if run is not None:
        path = Path(run)
        if not (path / "config.yaml").is_file():
            raise UsageError(
                f"{path} is not a run folder: it has no config.yaml. Name the trainer.output_dir of a run."
            )
        return path
    runs = find_runs(Path.cwd())
    if not runs:
        raise UsageError(f"There is no run in {Path.cwd()} or three levels below it. Name its folder.")
    return runs[0]
