"""The lock of a run folder: one run at a time."""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from enc.encoder.errors import UsageError
from enc.launcher.run_folder.events import since_submitted
from enc.launcher.run_folder.job import Job

FindJobs = Callable[[list[str]], dict[str, Job]]
_ENDING_S = 45.0  # schedulers give processes about half a minute to end
_LOCK_PATIENCE_S = 3.0  # batch workers of a killed run outlive it by a moment


class RunLock:
    """Exclusive use of a run folder; inherited by the processes started under it, released when the last one ends."""

    def __init__(
        self, run_dir: Path, find_jobs: FindJobs, patience_s: float = _LOCK_PATIENCE_S, job: str | None = None
    ) -> None:
        """Take the lock, making the folder if need be; `job` is the one that this process belongs to.

        `find_jobs` tells what schedulers know of jobs; inside the run's own job it is not asked. Raises UsageError when
        the lock is taken, by a process or by a job that is queued, or when it cannot be written.
        """
        self.run_dir = run_dir
        self.created = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
        give_up = time.monotonic() + patience_s
        while not self._try():
            if time.monotonic() > give_up:
                raise UsageError(self._taken())
            time.sleep(0.1)
        if job is None:
            self._refuse_queued_job(find_jobs)
        self.belongs_to(job)
        os.set_inheritable(self.file.fileno(), True)

    def belongs_to(self, job: str | None) -> None:
        """Name this process as the owner, and the job that has the run, which keeps it when this process has ended."""
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "job": job}
        self.file.truncate(0)
        self.file.write(json.dumps(owner))
        self.file.flush()

    def _refuse_queued_job(self, find_jobs: FindJobs) -> None:
        """Raise UsageError when a scheduler still has a job of the run: the last one, or one that follows it.

        One that is just ending is waited for.
        """
        named = [event.get("job") for event in since_submitted(self.run_dir)]
        ids = [job for job in dict.fromkeys([self._owner().get("job"), *named]) if isinstance(job, str)]
        give_up = time.monotonic() + _ENDING_S
        while left := {job: found for job, found in find_jobs(ids).items() if not found.is_over}:
            if all(found.phase == "ending" for found in left.values()) and time.monotonic() < give_up:
                time.sleep(0.5)
                continue
            job, found = next(iter(left.items()))
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
