"""SLURM as a backend. Methods import what they need: `enc status` asks every backend."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from enc.encoder.errors import UsageError
from enc.encoder.printable import Say
from enc.launcher.backends.interface import Launched
from enc.launcher.backends.slurm import commands as slurm
from enc.launcher.run_folder.job import Job

if TYPE_CHECKING:
    from enc.encoder.config.schema import RunConfig
    from enc.launcher.backends.slurm.host import SlurmHost
    from enc.launcher.checks.findings import Finding
    from enc.launcher.machine.facts import MachineFacts
    from enc.launcher.planning.plan import Plan
    from enc.launcher.run_folder.lock import RunLock

_CANCEL_TIMEOUT_S = 10.0
_WAITED = "It was waiting in the queue."
_GENTLE = "Its ranks save their state first; if they do not end, repeat this command."
_FORCED = "This time SLURM ends it: its ranks have the cluster's KillWait to save, 30 s by default."


class SlurmBackend:
    """A SLURM cluster: a run is a chain of jobs, each supervised by its batch process."""

    name, title = "slurm", "SLURM"

    def is_installed(self) -> bool:
        return slurm.is_installed()

    def current_job(self, environment: Mapping[str, str]) -> str | None:
        return environment.get("SLURM_JOB_ID")

    def defaults(self, config: "RunConfig", say: Say) -> "RunConfig":
        from enc.launcher.backends.slurm.defaults import with_cluster_defaults

        return with_cluster_defaults(config, say)

    def checks(self, plan: "Plan", facts: "MachineFacts") -> "list[Finding]":
        from enc.launcher.backends.slurm.checks import slurm_checks

        return slurm_checks(plan, facts)

    def probe(self, config: "RunConfig | None", facts: "MachineFacts", timeout_s: float) -> "list[Finding]":
        from enc.launcher.backends.slurm.probe import slurm_facts

        return slurm_facts(config, facts.environment, timeout_s)

    def render(self, plan: "Plan") -> dict[str, str]:
        from enc.launcher.backends.slurm.script import SCRIPT_FILE, script_of

        return {SCRIPT_FILE: script_of(plan)}

    def submit(self, plan: "Plan", lock: "RunLock", say: Say) -> Launched:
        from enc.launcher.backends.queue import JobScript, queue_run
        from enc.launcher.backends.slurm.script import SCRIPT_FILE, script_of

        details = {"after": plan.config.launch.slurm.after}
        script = JobScript(SCRIPT_FILE, script_of(plan), slurm.submit, slurm.cancel, details)
        return Launched(job=queue_run(plan, lock, script, say))

    def host(self, run_dir: Path, command: list[str]) -> "SlurmHost":
        from enc.launcher.backends.slurm.host import SlurmHost

        return SlurmHost(run_dir, command, os.environ)

    def owns(self, job: str) -> bool:
        return re.fullmatch("[0-9]+(_[0-9]+)?", job) is not None

    def jobs(self, ids: list[str], timeout_s: float) -> dict[str, Job]:
        return {asked: found.neutral() for asked, found in slurm.find_jobs(ids, timeout_s).items()}

    def folders_of_job(self, job: str, timeout_s: float) -> list[Path]:
        paths = slurm.job_paths(job, timeout_s)
        return [folder for path in paths for folder in (path, *path.parents[:2])] + paths[-1:]

    def cancel(self, ids: list[str], gently: bool) -> tuple[list[str], str]:
        """Cancel jobs; `gently` only tells the batch process of a running one, which ends it when the ranks have saved.

        The id of an array means all of its tasks.
        """
        try:
            known = slurm.find_jobs(ids, _CANCEL_TIMEOUT_S)
            left = [job for job in ids if job in known and not known[job].is_over] or ids[:1]
            for job in left:
                _cancel(job, known.get(job), gently)
        except UsageError as error:
            raise UsageError(f"{error} Repeat `enc cancel`, or run `scancel {ids[0]}`.") from None
        waited = left[0] in known and known[left[0]].state == "PENDING"
        return left, _WAITED if waited else _GENTLE if gently else _FORCED


def _cancel(job: str, found: slurm.Job | None, gently: bool) -> None:
    if not gently or found is None or found.state != "RUNNING":
        slurm.cancel(job)
        return
    slurm.cancel("--signal=TERM", "--batch", found.id)
    if found.id != job:
        slurm.cancel("--state=PENDING", job)  # the other tasks of an array
