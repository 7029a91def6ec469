"""Runs on this machine, in the foreground. Methods import what they need: `enc status` asks every backend."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from enc.encoder.errors import UsageError
from enc.encoder.printable import Say
from enc.launcher.backends.interface import Launched
from enc.launcher.run_folder.job import Job

if TYPE_CHECKING:
    from enc.encoder.config.schema import RunConfig
    from enc.launcher.checks.findings import Finding
    from enc.launcher.machine.facts import MachineFacts
    from enc.launcher.planning.plan import Plan
    from enc.launcher.run_folder.lock import RunLock


class LocalBackend:
    """This machine. It has no jobs: a run is the process that launched it."""

    name, title = "local", "this machine"

    def is_installed(self) -> bool:
        return True

    def current_job(self, environment: Mapping[str, str]) -> None:
        return None

    def defaults(self, config: "RunConfig", say: Say) -> "RunConfig":
        return config

    def checks(self, plan: "Plan", facts: "MachineFacts") -> "list[Finding]":
        from enc.launcher.checks.preflight import local_checks

        return local_checks(plan, facts)

    def probe(self, config: "RunConfig | None", facts: "MachineFacts", timeout_s: float) -> "list[Finding]":
        return []  # the doctor looks at this machine in any case

    def render(self, plan: "Plan") -> dict[str, str]:
        return {}

    def submit(self, plan: "Plan", lock: "RunLock", say: Say) -> Launched:
        from enc.launcher.backends.local_host import run_here

        return Launched(exit_code=run_here(plan, lock, say))

    def host(self, run_dir: Path, command: list[str]) -> NoReturn:
        raise UsageError(f"A local run has no job: start it with `enc resume latest --run {run_dir}`.")

    def owns(self, job: str) -> bool:
        return False

    def jobs(self, ids: list[str], timeout_s: float) -> dict[str, Job]:
        return {}

    def folders_of_job(self, job: str, timeout_s: float) -> list[Path]:
        return []

    def cancel(self, ids: list[str], gently: bool) -> tuple[list[str], str]:
        return [], ""
