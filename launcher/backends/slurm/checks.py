"""What can be known to go wrong with a run as a job of SLURM, before it is queued."""

import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import enc
from enc.encoder.config.launch import SlurmConfig
from enc.encoder.config.launch_checks import time_limit_s
from enc.encoder.config.schema import RunConfig
from enc.encoder.gpus import find_gpu
from enc.launcher.backends.slurm.commands import is_installed
from enc.launcher.checks.findings import Finding, green, red, yellow
from enc.launcher.checks.preflight import check_memory, check_ram, run_checks
from enc.launcher.machine.facts import MachineFacts
from enc.launcher.machine.mounts import Mount, why_node_local
from enc.launcher.planning.plan import Plan

_SHORT_S = 300
_MORE_RAM = "more memory a node (launch.slurm.mem), or more nodes"
_IMAGE_FILES = (".sif", ".sqsh", ".squashfs")


def slurm_checks(plan: Plan, facts: MachineFacts) -> list[Finding]:
    """Check whether a plan can work as a job."""
    slurm = plan.config.launch.slurm
    return run_checks({
        "SLURM": lambda: check_slurm(is_installed(), facts.job),
        "time limit": lambda: check_time(slurm),
        "shared paths": lambda: check_shared(shared_paths(plan), facts.mounts),
        "python": lambda: check_programs(plan.config),
        "memory": lambda: [check_memory(plan, *_device(plan))],
        "RAM": lambda: check_ram(plan, memory_asked(slurm.mem), "asked for by launch.slurm.mem", False, _MORE_RAM),
    })  # fmt: skip


def check_slurm(is_installed: bool, job: str | None) -> Iterator[Finding]:
    """A job is submitted with sbatch, which must be here."""
    if not is_installed:
        fix = "start it on a login node, write the script with `enc render slurm`, or set launch.scheduler local"
        yield red("SLURM", "this run is for SLURM, but there is no sbatch on this machine", fix)
    if job is not None:
        yield green("SLURM", f"this is inside job {job}; the run becomes a job of its own")


def check_time(slurm_config: SlurmConfig) -> Iterator[Finding]:
    """The time of a job must have room for a start, some steps and a save."""
    limit = time_limit_s(slurm_config.time) if slurm_config.time else None
    if limit and limit < max(_SHORT_S, 2 * slurm_config.signal_s):
        text = f"launch.slurm.time {slurm_config.time} is {limit} s: starting and saving may take most of it"
        yield yellow("time limit", text, "a longer launch.slurm.time")


def shared_paths(plan: Plan) -> dict[str, Path]:
    """Return what the compute nodes read and write."""
    paths = {"the run folder": plan.run_dir, "the token store": plan.store}
    launch = plan.config.launch
    if launch.container.kind == "none" and not launch.python:
        if sys.prefix != sys.base_prefix:
            paths["the Python environment"] = Path(sys.prefix)
        if not launch.snapshot_code:
            paths["enc itself"] = Path(enc.__file__).parent
    return paths


def check_shared(paths: dict[str, Path], mounts: Sequence[Mount]) -> Iterator[Finding]:
    """What the compute nodes use must lie where they see it."""
    hidden: dict[str, list[str]] = {}
    for name, path in paths.items():
        if why := why_node_local(path, mounts):
            hidden.setdefault(why, []).append(f"{name} ({path})")
    for why, names in hidden.items():
        text = f"the compute nodes will likely not see {', '.join(names)}: {why}"
        yield yellow("shared paths", text, "use a file system that all nodes share")
    if not hidden:
        yield green("shared paths", "nothing that the nodes need lies on a local file system of this machine")


def check_programs(config: RunConfig) -> Iterator[Finding]:
    """The Python and the container image that are named must exist, where this machine can tell."""
    launch = config.launch
    if launch.container.kind == "none" and launch.python:
        yield from _check_file("launch.python", launch.python, "/" in launch.python)
    image = launch.container.image
    if launch.container.kind != "none" and image:
        yield from _check_file("launch.container.image", image, image.startswith("/") or image.endswith(_IMAGE_FILES))


def _check_file(key: str, value: str, is_path: bool) -> Iterator[Finding]:
    """A file whose folder is here must be in it; a folder that is not here may be on the nodes."""
    path, what = Path(value).expanduser(), key.rpartition(".")[2]
    if not is_path:
        if key == "launch.python" and shutil.which(value) is None:
            yield yellow(what, f"{key} {value} is not on the PATH here", "name it with its full path")
    elif not path.exists() and path.parent.is_dir():
        yield red(what, f"{key} {value} does not exist", f"look into {path.parent} for its right name")
    elif not path.exists():
        yield yellow(what, f"{key} {value} is not on this machine; it must be on the nodes", "check the path")


def _device(plan: Plan) -> tuple[int | None, str]:
    """Return the memory of a rank's device, as far as it is known from here, and what to call it."""
    launch, ranks = plan.config.launch, plan.config.launch.nproc_per_node or 1
    if launch.gpu and not plan.config.trainer.use_cpu:
        gpu = find_gpu(launch.gpu)
        return gpu.bytes, f"on each {gpu.name}"
    asked = memory_asked(launch.slurm.mem) if plan.config.trainer.use_cpu else None
    return (asked // ranks, "of RAM for each rank (launch.slurm.mem)") if asked else (None, "")


def memory_asked(text: str | None) -> int | None:
    """Return the bytes of SLURM's `--mem`, which counts in MB; None for nothing asked, or 0, which is all there is."""
    match = re.fullmatch(r"([0-9]+)([KMGT]?)", text or "")
    if not match or int(match[1]) == 0:
        return None
    unit: int = 2 ** {"K": 10, "": 20, "M": 20, "G": 30, "T": 40}[match[2]]
    return int(match[1]) * unit
