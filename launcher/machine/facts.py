"""What this machine is like, looked at without torch: mounts, build locks, memory limits, ports."""

import contextlib
import os
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path

_NETWORK_TYPES = {
    "nfs", "nfs3", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "cifs", "smb3", "smbfs", "afs", "9p",
    "virtiofs", "orangefs", "pvfs2", "wekafs", "panfs", "dvs", "ocfs2", "gfs2", "quobyte", "hammerspace",
    "vast", "daos",
}  # fmt: skip
_LOCAL_FUSE = {"fuse.portal", "fuse.gvfsd-fuse", "fuse.snapfuse", "fuse.lxcfs", "fuse.fuse-overlayfs"}
_LOCAL_TYPES = {"tmpfs", "ramfs", "devtmpfs", "overlay", "ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "jfs", "zfs"}
_NODE_LOCAL_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm", "/run")
_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Mount:
    """A mounted file system."""

    point: str
    type: str

    @property
    def is_network(self) -> bool:
        """Whether other machines can have the same files."""
        return self.type in _NETWORK_TYPES or (self.type.startswith("fuse.") and self.type not in _LOCAL_FUSE)


def read_mounts() -> list[Mount]:
    """Return the mounted file systems; none where the system does not tell."""
    with contextlib.suppress(OSError):
        return parse_mounts(Path("/proc/self/mounts").read_text(errors="replace"))
    return []


def parse_mounts(text: str) -> list[Mount]:
    """Read the lines of /proc/self/mounts, in which a space is written as \\040."""
    words = [line.split() for line in text.splitlines()]
    return [Mount(re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), w[1]), w[2]) for w in words if len(w) > 2]


def mount_of(path: Path, mounts: list[Mount]) -> Mount | None:
    """Return the file system that a path lies on, or will; a later mount covers an earlier one."""
    real = os.path.realpath(path)
    holding = [mount for mount in mounts if f"{real}/".startswith(f"{mount.point.rstrip('/')}/")]
    return max(reversed(holding), key=lambda mount: len(mount.point), default=None)


def why_node_local(path: Path, mounts: list[Mount]) -> str | None:
    """Say why other machines will likely not see a path, or None.

    A local disk counts only where there are network file systems too: without any, the cluster is this machine.
    """
    mount, real = mount_of(path, mounts), os.path.realpath(path)
    if mount is None or mount.is_network:
        return None
    folder = next((name for name in _NODE_LOCAL_FOLDERS if f"{real}/".startswith(f"{name}/")), None)
    if folder:
        return f"{folder} is different on every machine"
    if mount.type in _LOCAL_TYPES and any(other.is_network for other in mounts):
        return f"{mount.point} is a local file system ({mount.type})"
    return None


def existing_parent(path: Path) -> Path:
    """Return the path itself or the nearest folder above it that exists."""
    return next(p for p in [path.absolute(), *path.absolute().parents] if os.path.exists(p))


# --- builds ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BuildLock:
    """A lock file that a build of a torch extension made; it waits for that file to go away, for ever if need be."""

    path: Path
    age_s: float
    holder: int | None  # process of this machine that has it open


def extensions_folder(variables: dict[str, str]) -> Path:
    """Return where torch builds extensions."""
    return Path(variables.get("TORCH_EXTENSIONS_DIR") or home(variables) / ".cache" / "torch_extensions").expanduser()


def build_locks(folder: Path) -> list[BuildLock]:
    """Return the lock files of builds below a folder."""
    paths = [path for pattern in ("lock", "*/lock", "*/*/lock") for path in sorted(folder.glob(pattern))]
    found = []
    for path in paths:
        with contextlib.suppress(OSError):  # released meanwhile
            found.append(BuildLock(path, time.time() - path.stat().st_mtime, _process_with(path)))
    return found


def _process_with(path: Path) -> int | None:
    """Return a process that has a file open; those of other users do not tell."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.path.samestat(link.stat(), path.stat()):
                return int(link.parts[2])
    return None


def home(variables: dict[str, str]) -> Path:
    """Return the home folder, also where nothing says what it is."""
    with contextlib.suppress(RuntimeError, KeyError):
        return Path(variables.get("HOME") or Path.home())
    return Path("/")


# --- memory, cores, ports --------------------------------------------------------------------------------------------


def cgroup_memory_limit(cgroups: str | None = None, root: Path = _CGROUPS) -> int | None:
    """Return the smallest limit of the control groups that this process is in, in bytes; None without one."""
    limits = [int(text) for text in _cgroup_values("memory", "memory.max", "memory.limit_in_bytes", cgroups, root)
              if text.isdigit()]  # fmt: skip
    return min(limits, default=None)


def cgroup_cores(cgroups: str | None = None, root: Path = _CGROUPS) -> float | None:
    """Return how many cores' time the control groups allow; None without a limit."""
    pairs = [text.split() for text in _cgroup_values("cpu", "cpu.max", "", cgroups, root)]
    return min((int(quota) / int(period) for quota, period in pairs if quota.isdigit()), default=None)


def _cgroup_values(controller: str, new: str, old: str, cgroups: str | None, root: Path) -> list[str]:
    """Return what a file says in each group from this process's own up to the root, in version 2 and version 1."""
    values = []
    for line in (_read("/proc/self/cgroup") if cgroups is None else cgroups).splitlines():
        _, controllers, inside = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top, name = (root / controller, old) if controllers else (root, new)
        own = top / inside.strip("/")
        for folder in (own, *own.parents):
            if name and folder.is_relative_to(top):
                values.append(_read(folder / name).strip())
    return [value for value in values if value]


def _read(path: str | Path) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text()
    return ""


def can_bind_port() -> bool:
    """Tell whether a TCP port of this machine can be used by ranks to find each other."""
    with contextlib.suppress(OSError), socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return True
    return False
