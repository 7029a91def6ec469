"""What this machine is like: looked at once by a command, without torch, and handed on."""

import os
import resource
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from enc.encoder.errors import UsageError
from enc.launcher.machine.cgroups import cgroup_memory_limit
from enc.launcher.machine.cpus import has_bf16, read_cpuinfo
from enc.launcher.machine.gpus import InstalledGpu, ask_nvidia_smi, count_gpus
from enc.launcher.machine.mounts import Mount, read_mounts


@dataclass(frozen=True)
class MachineFacts:
    """The machine and the surroundings of the command, as they were when it started."""

    cwd: Path
    environment: Mapping[str, str]
    num_gpus: int  # that this process may use
    list_gpus: Callable[[], list[InstalledGpu]]  # takes up to seconds, so `gpus` calls it when they are first asked for
    ram_bytes: int  # of the machine, or of the container or job that this process lives in
    physical_ram_bytes: int
    cores: int  # that this process may run on
    mounts: tuple[Mount, ...]
    open_files: tuple[int, int]  # soft and hard limit; -1 is none
    job: str | None  # of a scheduler, that this process is in
    cpu_has_bf16: bool = False  # in instructions of its own

    @cached_property
    def gpus(self) -> list[InstalledGpu]:
        """All GPUs of the machine. Raises UsageError with what nvidia-smi said."""
        return self.list_gpus()

    @cached_property
    def gpu_bytes(self) -> int | None:
        """The memory of the smallest GPU; None when it cannot be found out."""
        try:
            return min((gpu.total * 2**20 for gpu in self.gpus), default=None)
        except (UsageError, OSError):
            return None


def look(job: str | None = None, gpu_timeout_s: float = 20.0) -> MachineFacts:
    """Look at this machine; `job` is the one that this process is in, as far as it matters."""
    environment = dict(os.environ)
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return MachineFacts(
        cwd=Path.cwd(),
        environment=environment,
        num_gpus=count_gpus(environment),
        list_gpus=partial(ask_nvidia_smi, gpu_timeout_s),
        ram_bytes=min(physical, cgroup_memory_limit() or physical),
        physical_ram_bytes=physical,
        cores=len(os.sched_getaffinity(0)),
        mounts=tuple(read_mounts()),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE),
        job=job,
        cpu_has_bf16=has_bf16(read_cpuinfo(), environment),
    )
