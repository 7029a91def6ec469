"""The backends that there are: one for each value of `launch.scheduler`, `auto` aside."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from enc.encoder.errors import UsageError
from enc.launcher.backends.interface import Backend
from enc.launcher.backends.local import LocalBackend
from enc.launcher.backends.slurm.backend import SlurmBackend
from enc.launcher.run_folder.job import Job

if TYPE_CHECKING:
    from enc.encoder.config.schema import RunConfig

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (LocalBackend(), SlurmBackend())}
_TIMEOUT_S = 60.0


def backend_of(name: str) -> Backend:
    """Return the backend of a value of `launch.scheduler`."""
    return BACKENDS[name]


def choose_backend(config: "RunConfig") -> tuple["RunConfig", Backend]:
    """Return the config with `launch.scheduler` resolved, and its backend.

    `auto` is SLURM for what names nodes, a site or SLURM settings. One node stays one node where there is no SLURM: the
    run then starts on this machine. Raises UsageError when this machine is asked to be several.
    """
    from enc.encoder.config.launch import SlurmConfig

    launch = config.launch
    if launch.scheduler == "local" and launch.num_nodes > 1:
        raise UsageError(
            f"launch.scheduler is local, but launch.nodes is {launch.nodes}: this machine is one. Add --nodes 1, with "
            "--nproc-per-node for the ranks that you want here."
        )
    if launch.scheduler != "auto":
        return config, backend_of(launch.scheduler)
    asks = launch.site is not None or launch.slurm != SlurmConfig()
    nodes = launch.num_nodes > 1 or (launch.nodes is not None and backend_of("slurm").is_installed())
    name = "slurm" if asks or nodes else "local"
    return config.changed({"launch.scheduler": name}), backend_of(name)


def current_job(environment: Mapping[str, str]) -> str | None:
    """Return the job that a process with this environment is in."""
    return next((job for backend in BACKENDS.values() if (job := backend.current_job(environment))), None)


def owner_of(job: str) -> Backend | None:
    """Return the backend that has a job."""
    return next((backend for backend in BACKENDS.values() if backend.owns(job)), None)


def title_of(job: str) -> str:
    """Return what people call the scheduler of a job."""
    owner = owner_of(job)
    return owner.title if owner else "Its scheduler"


def find_jobs(ids: list[str]) -> dict[str, Job]:
    """Return what is known of jobs, as far as their schedulers can be asked here. Raises UsageError without answer."""
    found: dict[str, Job] = {}
    for backend in BACKENDS.values():
        own = [job for job in ids if backend.owns(job)]
        if own and backend.is_installed():
            found |= backend.jobs(own, _TIMEOUT_S)
    return found
