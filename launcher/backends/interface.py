"""What a scheduler, or this machine, must be able to do for a run; `registry` lists those that there are.

config --defaults--> plan --checks, render--> submit --> job        a launch (`launch`)
host                                                                the job from the inside (`supervise`)
owns, jobs, folders_of_job, cancel                                  jobs from the outside (`watch`, `RunLock`)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from enc.encoder.printable import Say
from enc.launcher.run_folder.job import Job

if TYPE_CHECKING:  # `enc status` needs none of these
    from enc.encoder.config.schema import RunConfig
    from enc.launcher.checks.findings import Finding
    from enc.launcher.machine.facts import MachineFacts
    from enc.launcher.planning.plan import Plan
    from enc.launcher.run_folder.lock import RunLock
    from enc.launcher.supervise.host import Host


@dataclass(frozen=True)
class Launched:
    """What became of a launch: a job that is queued, or a run that has ended here, with an exit code."""

    job: str | None = None
    exit_code: int = 0


class Backend(Protocol):
    """A place to run: each value of `launch.scheduler` but `auto` is one."""

    @property
    def name(self) -> str:
        """The value of `launch.scheduler`."""

    @property
    def title(self) -> str:
        """What people call it."""

    def is_installed(self) -> bool:
        """Tell whether it can be asked from this machine; it says nothing about whether it answers."""

    def current_job(self, environment: Mapping[str, str]) -> str | None:
        """Return the job that a process with this environment is in."""

    def defaults(self, config: "RunConfig", say: Say) -> "RunConfig":
        """Fill in what the machines themselves say, e.g. how many GPUs a node has."""

    def checks(self, plan: "Plan", facts: "MachineFacts") -> "list[Finding]":
        """Look at what can go wrong there, before anything is written."""

    def probe(self, config: "RunConfig | None", facts: "MachineFacts", timeout_s: float) -> "list[Finding]":
        """Look at the scheduler itself, for `enc doctor`, with the config of a run if one is meant."""

    def render(self, plan: "Plan") -> dict[str, str]:
        """Return the files that it needs beside those of the ranks, such as a job script: {file name: text}."""

    def submit(self, plan: "Plan", lock: "RunLock", say: Say) -> Launched:
        """Write the run folder and queue a job, or run here to the end. When it raises, no run is left behind."""

    def host(self, run_dir: Path, command: list[str]) -> "Host":
        """Return the job that this process is in, for its supervisor; `command` starts the ranks."""

    def owns(self, job: str) -> bool:
        """Tell by its form whether an id is of one of its jobs; no two backends have ids of the same form."""

    def jobs(self, ids: list[str], timeout_s: float) -> dict[str, Job]:
        """Return what is known of jobs, by the ids asked for. Raises UsageError when there is no answer in time."""

    def folders_of_job(self, job: str, timeout_s: float) -> list[Path]:
        """Return folders in which the run of a job may be, its working folder last. Raises UsageError likewise."""

    def cancel(self, ids: list[str], gently: bool) -> tuple[list[str], str]:
        """Cancel those of a run's jobs, newest first, that are not over; return them, and what that means for it.

        `gently` lets running ranks save, however long it takes. Raises UsageError that says how to repeat it by hand.
        """
