"""What the files of a run folder say, read so that nothing in them can stop the reader.

A file may be missing, half written, garbage or somebody else's: what cannot be read is left out or None.
"""

import fcntl
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from enc.encoder.tasks import TASKS, TaskRecord

_WHOLE = 16 * 2**20


@dataclass(frozen=True)
class Lock:
    """The owner that a run's lock names, and whether one of its processes lives (None: not known)."""

    held: bool | None = None
    host: str | None = None
    pid: int | None = None
    job: str | None = None


def json_lines(path: Path, last_bytes: int = -1) -> list[dict[str, Any]]:
    """Return the JSON objects among a file's lines, as far as they begin in its last bytes; by default all of them."""
    return objects(tail(path, last_bytes))


def objects(content: bytes) -> list[dict[str, Any]]:
    """Return the JSON objects among lines."""
    return [value for line in content.split(b"\n") if isinstance(value := _parsed(line), dict)]


def tail(path: Path, last_bytes: int) -> bytes:
    """Return the end of a file, or all of it (-1); nothing when it cannot be read."""
    try:
        with path.open("rb") as file:
            if last_bytes >= 0:
                file.seek(max(0, os.fstat(file.fileno()).st_size - last_bytes))
            return file.read(last_bytes)
    except OSError:
        return b""


def json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a small file; an empty one when there is none."""
    value = _parsed(tail(path, _WHOLE))
    return value if isinstance(value, dict) else {}


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content) if content else None
    except (ValueError, RecursionError):
        return None


def number(value: Any) -> float | None:
    """Return a finite number, else None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and abs(value) < 1e300 else None


def count(value: Any) -> int | None:
    """Return a whole number from 0 on, else None."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63 else None


def text(value: Any) -> str | None:
    """Return a text, else None."""
    return value if isinstance(value, str) else None


def texts(value: Any) -> list[str]:
    """Return the texts in a list."""
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def seconds(value: Any) -> float | None:
    """Return an event's time as Unix seconds; None when it is not one."""
    try:
        return datetime.fromisoformat(value).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None


def read_lock(run_dir: Path) -> Lock:
    """Read a run's lock and see whether it is held, without changing it."""
    path = run_dir / ".lock"
    owner = json_object(path)
    names = text(owner.get("host")), count(owner.get("pid")), text(owner.get("job"))
    return Lock(_is_held(path), *names)


def _is_held(path: Path) -> bool | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:  # a filesystem without locks
        return None
    finally:
        os.close(descriptor)


def config_number(config: str, section: str, key: str) -> float | None:
    """Return a number of a rendered config.yaml. Reading the YAML would take longer than all the rest of a run."""
    found = re.search(rf"^{section}:\n(?: .*\n)*?  {key}: *([0-9.e+]+) *$", config, flags=re.M)
    try:
        return number(float(found[1])) if found else None
    except ValueError:
        return None


def task_of(config: str) -> TaskRecord:
    """Return what is known of the task of a rendered config.yaml; of the first task where it names none that is."""
    found = re.search(r"^task: *(\S+) *$", config, flags=re.M)
    return TASKS.get(found[1] if found else "", next(iter(TASKS.values())))


def newest_attempt(run_dir: Path) -> int | None:
    """Return the number of the newest launch in a run folder."""
    try:
        names = os.listdir(run_dir / "launches")
    except OSError:
        return None
    return max((int(name) for name in names if name.isascii() and name.isdecimal()), default=None)


def unreadable(run_dir: Path, names: Iterable[str]) -> list[str]:
    """Return the files and folders of a run, among these, that are there but may not be read."""
    found = []
    for name in names:
        try:
            (run_dir / name).stat()
            readable = os.access(run_dir / name, os.R_OK)
        except FileNotFoundError:
            continue
        except OSError:
            readable = False
        if not readable:
            found.append(name)
    return found


def modified(path: Path) -> float | None:
    """Return when a file was last written, in Unix seconds."""
    try:
        return path.stat().st_mtime
    except OSError:
        return None
