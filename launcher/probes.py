"""What `enc doctor` looks at on this machine: software, GPUs, network, compilers, SLURM, disks.

A probe observes; what it makes of that is a function of what was observed, which tests call with other values.
"""

import csv
import fcntl
import json
import os
import resource
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from enc import __version__
from enc.encoder.config import RunConfig
from enc.encoder.errors import UsageError
from enc.encoder.sizes import checkpoint_bytes
from enc.launcher import machine, slurm, surroundings
from enc.launcher.devices import ram_bytes
from enc.launcher.findings import Finding, green, red, size, yellow
from enc.launcher.preflight import time_limit_s

_SHOWN = ("torch", "deepspeed", "transformers", "datasets", "tokenizers", "triton", "flash-attn", "wandb")
_PROBE_BYTES = 256 * 10**6
_PROBE_S = 4.0
_GPU_FIELDS = "index,name,driver_version,memory.total,memory.used,compute_cap"


# --- software --------------------------------------------------------------------------------------------------------


def versions() -> list[Finding]:
    """Look at what is installed, and compare it with what enc and torch ask for."""
    python = f"{__version__} in {os.path.dirname(os.path.dirname(__file__))}, Python {sys.version.split()[0]}"
    asked = [*_requirements("enc-toolkit"), *(r for r in _requirements("torch") if r.name == "triton")]
    return [green("enc", python), *check_versions({name: _version(name) for name in _SHOWN}, asked, _version)]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _requirements(distribution: str) -> list[Requirement]:
    """Return what a distribution needs on this platform, without its extras."""
    try:
        found = [Requirement(text) for text in metadata.requires(distribution) or []]
    except metadata.PackageNotFoundError:
        return []
    return [one for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]


def check_versions(shown: dict[str, str | None], asked: list[Requirement], version_of: Any) -> Iterator[Finding]:
    """A version outside of what is asked for is a combination that nobody has tested."""
    bad = {one.name: one for one in asked if not _meets(one, version_of(one.name))}
    for name, one in bad.items():
        has = version_of(name)
        text = f"{name} {has} is outside {one.specifier}" if has else f"{name} is missing"
        yield red(name, text, f"pip install '{name}{one.specifier}'")
    there = [f"{name} {version}" for name, version in shown.items() if version and name not in bad]
    if there:
        yield green("packages", ", ".join(there))
    absent = [name for name, version in shown.items() if version is None and name not in bad]
    if absent:
        yield green("not installed", f"{', '.join(absent)} (optional)")


def _meets(one: Requirement, version: str | None) -> bool:
    return version is not None and one.specifier.contains(version, prereleases=True)


def ask_torch(timeout_s: float) -> dict[str, Any]:
    """Let a process of its own import torch and say what it finds.

    Raises UsageError when it cannot, and TimeoutError when that takes too long.
    """
    command = [sys.executable, "-m", "enc.encoder.software"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"importing it and asking for GPUs took more than {timeout_s:g} s") from None
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        said = done.stderr.strip().splitlines()[-1:] or [f"it ended with code {done.returncode}"]
        raise UsageError(f"`import torch` fails: {said[0]}") from None


def check_torch(facts: dict[str, Any], num_gpus: int) -> Iterator[Finding]:
    """torch must be built for the GPUs that are here. `num_gpus` is what the driver shows."""
    built = f"built for CUDA {facts['cuda']}" if facts["cuda"] else "built without CUDA"
    if num_gpus and not facts["cuda"]:
        yield red("torch", f"{facts['torch']} is {built}, but this machine has GPUs: runs would use the CPU",
                  "install a CUDA build of torch (https://pytorch.org)")  # fmt: skip
    elif num_gpus and not facts["cuda_available"]:
        yield red("torch", f"{facts['torch']}, {built}, cannot use the GPUs here: {facts['cuda_said'] or 'no reason'}",
                  "a newer driver, or a torch built for an older CUDA; see `nvidia-smi`")  # fmt: skip
    else:
        yield green("torch", f"{facts['torch']}, {built}")
    for gpu in facts["gpus"]:
        if not _has_kernels(gpu["capability"], facts["architectures"]):
            text = f"{facts['torch']} has no kernels for {gpu['name']} (compute capability {_dotted(gpu)})"
            yield red("torch", text, "install a torch build that names this GPU's architecture")
    if facts["flash_attn"]:
        yield yellow("flash-attn", f"it is installed but cannot be imported: {facts['flash_attn']}",
                     "build it for this torch, or uninstall it")  # fmt: skip


def _dotted(gpu: dict[str, Any]) -> str:
    return ".".join(map(str, gpu["capability"]))


def _has_kernels(capability: list[int], architectures: list[str]) -> bool:
    """Tell whether torch has code for a device: its own, of an older minor of the same major, or to be translated."""
    for name in architectures:
        kind, _, digits = name.partition("_")
        number = int("".join(filter(str.isdigit, digits)) or 0)
        if kind == "compute" and [number // 10, number % 10] <= capability:
            return True
        if kind == "sm" and number // 10 == capability[0] and number % 10 <= capability[1]:
            return True
    return not architectures


def check_nccl(facts: dict[str, Any]) -> Iterator[Finding]:
    """Say which NCCL torch brings."""
    yield green("NCCL", facts["nccl"] or "none in this build of torch; ranks on CPUs use gloo")


def check_fast_paths(facts: dict[str, Any]) -> Iterator[Finding]:
    """Say for each kernel whether its fast path runs, and why not."""
    for name, reason in facts["why_not"].items():
        yield green(name, reason or "the fast path runs")


# --- GPUs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GpuSeen:
    """A line of nvidia-smi; memory in MiB."""

    index: str
    name: str
    driver: str
    total: int
    used: int
    capability: str


def read_gpus(timeout_s: float) -> list[GpuSeen]:
    """Ask nvidia-smi for the GPUs; none where it is not installed. Raises UsageError with what it said."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={_GPU_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise UsageError(f"nvidia-smi did not answer within {timeout_s:g} s: a GPU or the driver hangs") from None
    if done.returncode:
        raise UsageError(f"nvidia-smi failed: {' '.join((done.stdout + done.stderr).split())}")
    return [gpu for row in csv.reader(done.stdout.splitlines(), skipinitialspace=True) if (gpu := _gpu_of(row))]


def _gpu_of(row: list[str]) -> GpuSeen | None:
    try:
        index, name, driver, total, used, capability = row
        return GpuSeen(index, name, driver, int(total), int(used), capability)
    except ValueError:
        return None


def check_gpus(gpus: list[GpuSeen], visible: str | None) -> Iterator[Finding]:
    """GPUs should be alike, empty and visible."""
    if not gpus:
        yield green("GPUs", "none on this machine")
        return
    kinds = {(gpu.name, gpu.total): sum((o.name, o.total) == (gpu.name, gpu.total) for o in gpus) for gpu in gpus}
    named = ", ".join(f"{count} x {name} of {total / 1024:.0f} GiB" for (name, total), count in kinds.items())
    text = f"{named}, compute capability {', '.join(sorted({g.capability for g in gpus}))}, driver {gpus[0].driver}"
    if len(kinds) > 1:
        yield yellow(
            "GPUs", f"they differ: {text}", "choose equal ones with CUDA_VISIBLE_DEVICES: the slowest sets the pace"
        )
    else:
        yield green("GPUs", text)
    for gpu in gpus:
        if gpu.used > 0.05 * gpu.total:
            yield yellow("GPU in use", f"GPU {gpu.index} has {gpu.used / 1024:.1f} of {gpu.total / 1024:.0f} GiB taken "
                         "by other processes", "`nvidia-smi` shows whose; wait, or choose others")  # fmt: skip
    if visible is not None:
        yield from _check_visible(visible, [gpu.index for gpu in gpus])


def _check_visible(visible: str, known: list[str]) -> Iterator[Finding]:
    words = [word.strip() for word in visible.split(",") if word.strip()]
    unknown = [word for word in words if word.isdigit() and word not in known]
    if unknown:
        yield red("GPUs", f"CUDA_VISIBLE_DEVICES is {visible}, but the GPUs here are {', '.join(known)}",
                  "correct it, or unset it")  # fmt: skip
    elif not words or "-1" in words:
        yield yellow("GPUs", f"CUDA_VISIBLE_DEVICES is {visible!r}: it hides all of them", "unset it")


# --- network ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interface:
    """A network interface."""

    name: str
    is_up: bool
    address: str | None  # IPv4


def read_interfaces() -> list[Interface]:
    """Return the network interfaces of this machine."""
    return [Interface(name, _is_up(name), _address(name)) for _, name in socket.if_nameindex()]


def _is_up(name: str) -> bool:
    try:
        return bool(int(Path(f"/sys/class/net/{name}/flags").read_text(), 16) & 1)
    except (OSError, ValueError):
        return False


def _address(name: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe, 0x8915, struct.pack("256s", name.encode()[:15]))  # SIOCGIFADDR
        except OSError:
            return None
    return socket.inet_ntoa(answer[20:24])


def check_network(
    interfaces: list[Interface], fabrics: list[str], variables: dict[str, str], on_nodes: bool
) -> Iterator[Finding]:
    """NCCL and gloo must find an interface. `on_nodes`: the run is for other machines, whose interfaces may differ."""
    up = [one for one in interfaces if one.is_up and one.address]
    yield green("interfaces", ", ".join(f"{one.name} {one.address}" for one in up) or "none is up with an address")
    if fabrics:
        yield green("InfiniBand", ", ".join(fabrics))
        if variables.get("NCCL_IB_DISABLE", "0") not in ("", "0"):
            yield yellow("InfiniBand", "NCCL_IB_DISABLE is set, so that NCCL does not use it", "unset NCCL_IB_DISABLE")
    names = [one.name for one in interfaces]
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        value = variables.get(variable, "")
        if value and not _matches(variable, value, [one.name for one in up], names):
            text = f"{variable} is {value}, but this machine has {', '.join(names)}"
            if any(_matches(variable, value, [name], names) for name in names):
                text = f"{variable} is {value}, which is down or has no address"
            if on_nodes:
                yield yellow("interfaces", text, "make sure that the compute nodes have it, or unset it")
            else:
                yield red("interfaces", text, "correct it, or unset it")


def _matches(variable: str, value: str, usable: list[str], names: list[str]) -> bool:
    """Tell whether an interface is left to use. NCCL's words are prefixes, `=` makes them whole names, `^` excludes."""
    words = [word for word in value.lstrip("^=").split(",") if word]
    if variable == "GLOO_SOCKET_IFNAME":
        return all(word in usable for word in words)
    exact = value.startswith(("=", "^="))
    chosen = {name for name in names if any(name == word if exact else name.startswith(word) for word in words)}
    return any((name in chosen) != value.startswith("^") for name in usable)


def read_fabrics() -> list[str]:
    """Return the InfiniBand devices of this machine with the state of their first port."""
    folder = Path("/sys/class/infiniband")
    found = []
    for device in sorted(folder.iterdir()) if folder.is_dir() else []:
        state = device / "ports" / "1" / "state"
        found.append(f"{device.name} {state.read_text().partition(':')[2].strip() if state.exists() else '?'}")
    return found


# --- compilers -------------------------------------------------------------------------------------------------------


def compilers(config: RunConfig | None) -> list[Finding]:
    """Look for what compiles kernels, and for what an interrupted build left behind."""
    variables = dict(os.environ)
    compiler = shutil.which(variables.get("CXX") or "g++") or shutil.which("c++") or shutil.which("clang++")
    compiles = (
        config is not None and config.trainer.torch_compile and config.trainer.torch_compile_backend == "inductor"
    )
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{variables.get('CUDA_HOME', '/usr/local/cuda')}/bin")
    locks = machine.build_locks(machine.extensions_folder(variables))
    is_needed = config is not None and config.parallel.engine == "deepspeed"
    return [
        check_compiler(compiler, compiles),
        *check_nvcc(nvcc, variables.get("CUDA_HOME")),
        *surroundings.check_build_locks(locks, is_needed, machine.read_mounts()),
    ]


def check_compiler(compiler: str | None, is_needed: bool) -> Finding:
    """torch.compile and Triton need a C++ compiler; DeepSpeed's offloading does not: its optimizer is torch's."""
    if compiler:
        return green("C++ compiler", compiler)
    if is_needed:
        return red(
            "C++ compiler", "none, but trainer.torch_compile is true", "install g++, or set trainer.torch_compile false"
        )
    return green("C++ compiler", "none; only trainer.torch_compile and Triton need one")


def check_nvcc(nvcc: str | None, cuda_home: str | None) -> Iterator[Finding]:
    """Only extensions that are built here need nvcc, e.g. flash-attn; enc itself builds none."""
    if cuda_home and not Path(cuda_home).is_dir():
        yield yellow("CUDA_HOME", f"{cuda_home} does not exist", "correct it, or unset it")
    yield green("nvcc", nvcc or "none; only building flash-attn and the like needs it")


# --- machine ---------------------------------------------------------------------------------------------------------


def machine_facts() -> list[Finding]:
    """Look at cores, memory and limits."""
    usable, cores = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    allowed = machine.cgroup_cores()
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limited = f" of {size(physical)}: a control group limits this process" if ram_bytes() < physical else ""
    shared = shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else None
    return [
        check_cores(usable, cores, allowed, os.getloadavg()[0]),
        green("RAM", f"{size(ram_bytes())}{limited}"),
        *check_shared_memory(shared),
        surroundings.check_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE)),
        *check_locked_memory(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], bool(read_fabrics())),
    ]


def check_cores(usable: int, cores: int, allowed: float | None, load: float) -> Finding:
    """Say how many cores there are for this process; a busy machine makes each step slow."""
    text = f"{usable} of {cores} for this process" if usable < cores else f"{cores}"
    if allowed is not None and allowed < usable:
        text += f", limited to the time of {allowed:g} by a control group"
    if load > 1.5 * usable + 1:
        return yellow("cores", f"{text}, and the load is {load:.1f}: other processes are at work", "`top` shows them")
    return green("cores", text)


def check_shared_memory(total: int | None) -> Iterator[Finding]:
    """Batch workers and ranks pass tensors through /dev/shm; containers have 64 MB by default."""
    if total is not None and total < 2**30:
        yield yellow("/dev/shm", f"only {size(total)}: batch workers may die with a bus error",
                     "start the container with --shm-size=8g or --ipc=host")  # fmt: skip


def check_locked_memory(limit: int, has_fabric: bool) -> Iterator[Finding]:
    """InfiniBand pins memory."""
    if has_fabric and limit != resource.RLIM_INFINITY:
        yield yellow("locked memory", f"limited to {size(limit)}, but InfiniBand needs to pin more",
                     "`ulimit -l unlimited`, or ask the administrator")  # fmt: skip


# --- SLURM -----------------------------------------------------------------------------------------------------------


def slurm_facts(config: RunConfig | None, for_slurm: bool, timeout_s: float) -> list[Finding]:
    """Ask SLURM for its partitions, and compare the config with the allocation that this process is in."""
    if not slurm.is_installed():
        return [green("SLURM", "not installed here")]
    inside = list(check_allocation(config, for_slurm, dict(os.environ)))
    try:
        partitions = slurm.partitions(timeout_s)
    except UsageError as error:
        return [check_silence(str(error), for_slurm), *inside]
    return [*check_partitions(partitions, config if for_slurm else None), *inside]


def check_silence(said: str, for_slurm: bool) -> Finding:
    """SLURM's commands are here, but nobody answers them."""
    level = red if for_slurm else yellow
    if "configuration source" in said:
        fix = "log in to a machine of the cluster, or set SLURM_CONF to its slurm.conf"
        return level("SLURM", "its commands are installed, but this machine belongs to no cluster: no slurm.conf", fix)
    if "Unable to contact slurm controller" in said:
        said = "its controller cannot be reached (sinfo: Unable to contact slurm controller)"
    return level("SLURM", said, "`scontrol ping` tells more; ask the cluster's administrators")


def check_partitions(partitions: list[slurm.Partition], config: RunConfig | None) -> Iterator[Finding]:
    """The partition that a job of this config goes to must be there, be up, and have enough nodes and time."""
    asked = config.launch.slurm.partition if config else None
    names = asked.split(",") if asked else []
    for one in partitions:
        if not names or one.name in names:
            is_used = one.name in names or (not names and one.is_default)
            yield _check_partition(one, config if is_used else None)
    known = [one.name for one in partitions]
    missing = [name for name in names if name not in known]
    if missing:
        yield red("partition", f"launch.slurm.partition {', '.join(missing)} does not exist for you",
                  f"use one of {', '.join(known)}")  # fmt: skip
    if not known:
        yield yellow("partition", "SLURM shows none", "ask the cluster's administrators for access")


def _check_partition(one: slurm.Partition, config: RunConfig | None) -> Finding:
    """Check the partition of a job; without a config only say what it offers."""
    has_limit = one.time_limit[:1].isdigit()
    limit = f"time limit {one.time_limit}" if has_limit else "no time limit"
    nodes = f"{one.num_nodes:,} node{'' if one.num_nodes == 1 else 's'}, {one.idle_nodes:,} idle"
    text = f"{one.name}{', the default' if one.is_default else ''}: {limit}, {nodes}"
    asked = config.launch.slurm.time if config else None
    if config and one.num_nodes < config.launch.num_nodes:
        return red("partition", f"{text}, but launch.nodes is {config.launch.num_nodes}",
                   "fewer nodes, or another launch.slurm.partition")  # fmt: skip
    if asked and has_limit and time_limit_s(asked) > time_limit_s(one.time_limit):
        return red("partition", f"{text}, but launch.slurm.time is {asked}: the job would never start",
                   "a shorter launch.slurm.time; a run takes as many jobs as it needs")  # fmt: skip
    if one.state != "up":
        return yellow("partition", f"{text}, {one.state}", "jobs wait until it is up; choose another one")
    return green("partition", text)


def check_allocation(config: RunConfig | None, for_slurm: bool, variables: dict[str, str]) -> Iterator[Finding]:
    """Inside a job, a run that starts here should use what the job has: nodes, and ranks on each."""
    job = variables.get("SLURM_JOB_ID")
    if job is None:
        return
    nodes = _number(variables, "SLURM_JOB_NUM_NODES") or _number(variables, "SLURM_NNODES")
    ranks = _number(variables, "SLURM_GPUS_ON_NODE") or _number(variables, "SLURM_NTASKS_PER_NODE")
    has = f"job {job} has {_counted(nodes, 'node')}" + (f" with {_counted(ranks, 'GPU or task')} each" if ranks else "")
    yield green("allocation", f"this is inside SLURM: {has}")
    if config is None or for_slurm:  # a job of its own
        return
    for key, asked, there in (
        ("launch.nodes", config.launch.num_nodes, nodes),
        ("launch.nproc_per_node", config.launch.nproc_per_node, ranks),
    ):
        if asked and there and asked > there:
            yield red("allocation", f"{key} is {asked}, but {has}", f"set {key} {there}, or ask for a larger job")
        elif asked and there and asked < there:
            yield yellow("allocation", f"{key} is {asked}, but {has}: the rest is idle", f"set {key} {there}")


def _number(variables: dict[str, str], name: str) -> int | None:
    text = variables.get(name, "")
    return int(text) if text.isdigit() else None


def _counted(number: int | None, noun: str) -> str:
    return f"{number or '?'} {noun}{'' if number == 1 else 's'}"


# --- disks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DiskSpeed:
    """What writing and reading a file took."""

    num_bytes: int
    write_s: float
    read_s: float
    clock_skew_s: float


def measure_disk(folder: Path) -> DiskSpeed:
    """Write, flush and read back up to 256 MB, or as much as goes in a few seconds.

    The file has no name, so nothing is left of it whatever ends this process.
    """
    block = os.urandom(8 * 10**6)
    with tempfile.TemporaryFile(dir=folder) as file:
        began, started = time.time(), time.perf_counter()
        written = 0
        while written < _PROBE_BYTES and time.perf_counter() - started < _PROBE_S:
            written += file.write(block)
        file.flush()
        os.fsync(file.fileno())
        write_s, ended = time.perf_counter() - started, time.time()
        changed = os.fstat(file.fileno()).st_mtime
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        file.seek(0)
        while file.read(len(block)):
            pass
        read_s = time.perf_counter() - started
    return DiskSpeed(written, write_s, read_s, max(0.0, changed - ended, began - changed))


def disk_speed(folder: Path, config: RunConfig | None) -> list[Finding]:
    """Measure the disk of the run folder."""
    place = machine.existing_parent(folder)
    reserve = config.trainer.min_free_disk_gb * 1e9 if config else 0
    free = shutil.disk_usage(place).free
    if free < reserve + 4 * _PROBE_BYTES:
        return [yellow("speed", f"not measured: {place} has only {size(free)} free", "free some space")]
    if not os.access(place, os.W_OK):
        return [yellow("speed", f"not measured: {place} cannot be written", "choose another trainer.output_dir")]
    mount = machine.mount_of(place, machine.read_mounts())
    one = checkpoint_bytes(config.model) if config else None
    return list(check_speed(measure_disk(place), f"{place} ({mount.type})" if mount else str(place), one))


def check_speed(speed: DiskSpeed, place: str, checkpoint: int | None) -> Iterator[Finding]:
    """A save must not take minutes, and the clock of a file server should agree with ours."""
    write, read = speed.num_bytes / speed.write_s, speed.num_bytes / max(speed.read_s, 1e-9)
    text = f"{place} writes {write / 1e6:,.0f} MB/s, reads {read / 1e6:,.0f} MB/s"
    if checkpoint:
        text += f": about {_seconds(checkpoint / write)} for a checkpoint of {size(checkpoint)}"
    if (checkpoint and checkpoint / write > 300) or write < 20e6:
        yield yellow("speed", text, "a faster disk for trainer.output_dir, or fewer saves (trainer.save_steps)")
    else:
        yield green("speed", text)
    if speed.clock_skew_s > 2:
        text = f"the clock of {place} and that of this machine differ by {_seconds(speed.clock_skew_s)}"
        yield yellow("clock", text, "tell the administrator; times of files and events will not match")


def _seconds(seconds: float) -> str:
    if seconds < 0.1:
        return "less than 0.1 s"
    return (
        f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"
    )
