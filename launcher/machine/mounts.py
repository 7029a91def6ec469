"""The mounted file systems: which lie on a file server, and which other machines will not see."""

import contextlib
import os
import re
from collections.abc import Sequence
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


def mount_of(path: Path, mounts: Sequence[Mount]) -> Mount | None:
    """Return the file system that a path lies on, or will; a later mount covers an earlier one."""
    real = os.path.realpath(path)
    holding = [mount for mount in mounts if f"{real}/".startswith(f"{mount.point.rstrip('/')}/")]
    return max(reversed(holding), key=lambda mount: len(mount.point), default=None)


def why_node_local(path: Path, mounts: Sequence[Mount]) -> str | None:
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
