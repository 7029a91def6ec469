"""What the control groups allow that this process is in."""

import contextlib
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


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
