"""Things that are made once for all workers of a session, and only read by tests."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import processes
import pytest

cpu_s: dict[str, float] = {}  # processor seconds that the things which this worker made have cost


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Path]) -> Path:
    """Return what `make(folder)` returns, from this worker or from the one that came first."""
    base = factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    made, folder = root / f"{name}.made", root / name
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            folder.mkdir()
            before = processes.cpu_s()
            made.write_text(str(make(folder)))
            cpu_s[name] = processes.cpu_s() - before
    return Path(made.read_text())
