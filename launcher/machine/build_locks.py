"""Locks that builds of torch extensions leave behind, and the folders that they lie in."""

import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class BuildLock:
    """A lock file that a build of a torch extension made; it waits for that file to go away, for ever if need be."""

    path: Path
    age_s: float
    holder: int | None  # process of this machine that has it open


def extensions_folder(variables: Mapping[str, str]) -> Path:
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


def home(variables: Mapping[str, str]) -> Path:
    """Return the home folder, also where nothing says what it is."""
    with contextlib.suppress(RuntimeError, KeyError):
        return Path(variables.get("HOME") or Path.home())
    return Path("/")
