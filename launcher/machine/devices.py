"""The devices of this machine, looked at without starting CUDA."""

import functools
import os
import subprocess
from pathlib import Path

from enc.encoder.config.schema import RunConfig
from enc.encoder.gpus import find_gpu
from enc.launcher.backends.slurm.script import ranks_per_node
from enc.launcher.machine.facts import cgroup_memory_limit


def num_gpus(config: RunConfig) -> int:
    """Count the NVIDIA GPUs that a run may use."""
    if config.trainer.use_cpu:
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([word for word in visible.split(",") if word.strip() not in ("", "-1")])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def default_ranks(config: RunConfig) -> int:
    """Return the processes on one machine: as the config says, or one a GPU of this one, or one.

    Raises UsageError for a job on a cluster that does not say how many GPUs its machines have.
    """
    if config.launch.scheduler == "slurm":
        return ranks_per_node(config)
    return config.launch.nproc_per_node or max(num_gpus(config), 1)


def device_bytes(config: RunConfig, ranks: int) -> int | None:
    """Return the memory that one of so many ranks on a machine may use: its GPU's, or its share of the RAM.

    None when it cannot be found out, as for the machines of a cluster whose GPUs `launch.gpu` does not name.
    """
    if config.launch.gpu is not None and not config.trainer.use_cpu:
        return find_gpu(config.launch.gpu).bytes
    if config.launch.scheduler == "slurm" and "SLURM_JOB_ID" not in os.environ:
        return None
    return _gpu_bytes() if num_gpus(config) else ram_bytes() // ranks


@functools.cache
def _gpu_bytes() -> int | None:
    """Return the memory of the smallest GPU."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        return min(int(line) for line in output.split()) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def ram_bytes() -> int:
    """Return the RAM of this machine, or of the container or job that this process lives in."""
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(ram, cgroup_memory_limit() or ram)
