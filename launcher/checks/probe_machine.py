"""What `enc doctor` makes of the network, the machine and its disks.

A probe observes; what it makes of that is a function of what was observed, which tests call with other values.
"""

import fcntl
import os
import resource
import shutil
import socket
import struct
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from enc.encoder.config.schema import RunConfig
from enc.encoder.quantities import size_text
from enc.encoder.sizing.sizes import checkpoint_bytes
from enc.launcher.checks import environment
from enc.launcher.checks.findings import Finding, green, red, yellow
from enc.launcher.machine.cgroups import cgroup_cores
from enc.launcher.machine.facts import MachineFacts
from enc.launcher.machine.mounts import existing_parent, mount_of

_PROBE_BYTES = 256 * 10**6
_PROBE_S = 4.0


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


# --- machine ---------------------------------------------------------------------------------------------------------


def check_machine(facts: MachineFacts) -> list[Finding]:
    """Look at cores, memory and limits."""
    physical = facts.physical_ram_bytes
    limited = f" of {size_text(physical)}: a control group limits this process" if facts.ram_bytes < physical else ""
    shared = shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else None
    return [
        check_cores(facts.cores, os.cpu_count() or 1, cgroup_cores(), os.getloadavg()[0]),
        green("RAM", f"{size_text(facts.ram_bytes)}{limited}"),
        *check_shared_memory(shared),
        environment.check_open_files(*facts.open_files),
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
        yield yellow("/dev/shm", f"only {size_text(total)}: batch workers may die with a bus error",
                     "start the container with --shm-size=8g or --ipc=host")  # fmt: skip


def check_locked_memory(limit: int, has_fabric: bool) -> Iterator[Finding]:
    """InfiniBand pins memory."""
    if has_fabric and limit != resource.RLIM_INFINITY:
        yield yellow("locked memory", f"limited to {size_text(limit)}, but InfiniBand needs to pin more",
                     "`ulimit -l unlimited`, or ask the administrator")  # fmt: skip


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


def disk_speed(folder: Path, config: RunConfig | None, facts: MachineFacts) -> list[Finding]:
    """Measure the disk of the run folder."""
    place = existing_parent(folder)
    reserve = config.trainer.min_free_disk_gb * 1e9 if config else 0
    free = shutil.disk_usage(place).free
    if free < reserve + 4 * _PROBE_BYTES:
        return [yellow("speed", f"not measured: {place} has only {size_text(free)} free", "free some space")]
    if not os.access(place, os.W_OK):
        return [yellow("speed", f"not measured: {place} cannot be written", "choose another trainer.output_dir")]
    mount = mount_of(place, facts.mounts)
    one = checkpoint_bytes(config) if config else None
    return list(check_speed(measure_disk(place), f"{place} ({mount.type})" if mount else str(place), one))


def check_speed(speed: DiskSpeed, place: str, checkpoint: int | None) -> Iterator[Finding]:
    """A save must not take minutes, and the clock of a file server should agree with ours."""
    write, read = speed.num_bytes / speed.write_s, speed.num_bytes / max(speed.read_s, 1e-9)
    text = f"{place} writes {write / 1e6:,.0f} MB/s, reads {read / 1e6:,.0f} MB/s"
    if checkpoint:
        text += f": about {_seconds(checkpoint / write)} for a checkpoint of {size_text(checkpoint)}"
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
