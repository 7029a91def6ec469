"""What a scheduler, or this machine, must be able to do for a run. `registry` has the ones that there are.

defaults -> (plan) -> checks -> render -> submit -> job ... host: the job from the inside
                                                      ... jobs, run_of_job, cancel: from the outside
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from enc.encoder.config.schema import RunConfig
from enc.launcher.checks.findings import Finding
from enc.launcher.planning.plan import Plan
from enc.launcher.run_folder.job import Job
from enc.launcher.run_folder.lock import RunLock
from enc.launcher.supervise.host import Host

Say = Callable[[str], None]


@dataclass(frozen=True)
class Launched:
    """What became of a launch: a job that is queued, or a run that has ended here with an exit code."""

    job: str | None = None
    exit_code: int = 0


class Backend(Protocol):
    """A way to run: each value of `launch.scheduler` but `auto` is one."""

    name: str
    """The value of `launch.scheduler`."""
    title: str
    """Its name in sentences."""

    def is_installed(self) -> bool:
        """Tell whether a run can be started with it from this machine."""

    def defaults(self, config: RunConfig, say: Say) -> RunConfig:
        """Fill in what the machines themselves say, e.g. how many GPUs a node has."""

    def checks(self, plan: Plan) -> list[Finding]:
        """Look at what a run needs of it, before anything is written."""

    def probe(self, config: RunConfig | None, timeout_s: float) -> list[Finding]:
        """Look at it for `enc doctor`; `config` is None where no run of it is meant."""

    def render(self, plan: Plan) -> dict[str, str]:
        """Return the files that it reads itself, such as a job script. Pure."""

    def submit(self, plan: Plan, lock: RunLock, say: Say) -> Launched:
        """Write the run folder and queue a job, or run here to the end. Raises UsageError, and nothing is left."""

    def owns(self, job: str) -> bool:
        """Tell by its form whether an id is one of this backend's; no two backends have ids of one form."""

    def jobs(self, ids: list[str], timeout_s: float) -> dict[str, Job]:
        """Return what is known of jobs, by the ids asked for; UsageError when there is no answer in time."""

    def folders_of_job(self, job: str, timeout_s: float) -> list[Path]:
        """Return folders that may hold the run of a job, likely ones first, the working folder last."""

    def cancel(self, ids: list[str], gently: bool) -> list[str]:
        """Cancel those jobs, newest first, that are not over, and return their ids; UsageError when that fails.

        `gently` lets ranks save, however long that takes. When none is known any more, the newest is tried.
        """

    def host(self, run_dir: Path, command: list[str]) -> Host:
        """Return the job that this process is in, as its supervisor sees it; `command` starts the ranks."""
