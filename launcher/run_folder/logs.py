"""The log files of a run: which one is meant, its last lines, and following it from attempt to attempt."""

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from enc.encoder.errors import UsageError
from enc.encoder.printable import printable

_BLOCK = 2**16
_POLL_S = 0.3
_COLOUR = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")


def plain(line: bytes) -> str:
    """Return a line of a log as a terminal would show it, harmless: no colours, escapes escaped."""
    text = line.decode("utf-8", errors="backslashreplace").rstrip("\r\n")
    parts = [part for part in text.split("\r") if part]  # a progress bar writes over itself
    return printable(_COLOUR.sub("", parts[-1] if parts else "").expandtabs())


def attempts(run_dir: Path) -> list[int]:
    """Return the attempts of a run that have logs, oldest first."""
    names = (path.name for path in (run_dir / "logs").glob("*") if path.is_dir())
    return sorted(int(name) for name in names if name.isascii() and name.isdecimal())


def log_file(run_dir: Path, attempt: int | None, rank: int | None) -> Path | None:
    """Return the log of an attempt: what rank 0 says, or all output of a rank; None when there is none (yet).

    Raises UsageError for an attempt or a rank that the run does not have.
    """
    if attempt is None:
        return None
    folder = run_dir / "logs" / str(attempt)
    path = folder / ("console.log" if rank is None else f"rank{rank}.log")
    if path.is_file():
        return path
    if rank == 0 and (folder / "console.log").is_file():  # a local run's rank 0 writes to the terminal
        return folder / "console.log"
    if rank is not None and folder.is_dir():
        ranks = sorted(int(name) for p in folder.glob("rank*.log") if (name := p.stem[4:]).isdecimal())
        if ranks:
            raise UsageError(
                f"Attempt {attempt} of {run_dir} has no log of rank {rank}. Logs of ranks: {_list(ranks)}."
            )
    return None


def batch_log(run_dir: Path, job: str | None) -> Path | None:
    """Return what the batch process of a job wrote (of the newest job without one); None when there is none."""
    pattern = "*-*.log" if job is None else f"*-{job}*.log"  # <scheduler>-<job>.log
    found = [p for p in (run_dir / "logs").glob(pattern) if p.is_file()]
    return max(found, key=lambda p: p.stat().st_mtime, default=None)


def _list(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return f"{shown}, ... {numbers[-1]}" if len(numbers) > 8 else shown


class LogReader:
    """Reads the lines of a growing file; a last line without its end is held back until it is finished or long."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = 0
        self.rest = b""

    def skip_to_last(self, lines: int) -> None:
        """Go to the last `lines` lines."""
        with self.path.open("rb") as file:
            end = start = file.seek(0, 2)
            found = b""
            while start > 0 and found[:-1].count(b"\n") < max(lines, 1):
                size = min(_BLOCK, start)
                start -= size
                file.seek(start)
                found = file.read(size) + found
        kept = found.splitlines(keepends=True)[-lines:] if lines else []
        self.position = end - sum(map(len, kept))

    def lines(self, to_the_end: bool = False) -> Iterator[str]:
        """Return the lines that have come; `to_the_end` also a last one that is not finished."""
        try:
            with self.path.open("rb") as file:
                if file.seek(0, 2) < self.position:  # it was replaced by a shorter one
                    self.position, self.rest = 0, b""
                file.seek(self.position)
                while block := file.read(_BLOCK):
                    self.position += len(block)
                    *whole, self.rest = (self.rest + block).split(b"\n")
                    yield from map(plain, whole)
                    if len(self.rest) > 16 * _BLOCK:
                        yield plain(self.rest)
                        self.rest = b""
        except FileNotFoundError:
            return
        if to_the_end and self.rest:
            yield plain(self.rest)
            self.rest = b""


def follow(
    find: Callable[[], Path | None],
    is_over: Callable[[], bool],
    last_lines: int | None,
    announce: Callable[[Path], None],
) -> Iterator[str]:
    """Return the lines of a run's log as they come, until the run is over.

    `find` returns the log to read now: when it changes, the old one is read to its end and `announce` tells of the new.
    """
    reader: LogReader | None = None
    while True:
        ended = is_over()  # asked first: what is written before the end is read below
        path = find()
        if path is not None and (reader is None or path != reader.path):
            if reader is not None:
                yield from reader.lines(to_the_end=True)
                announce(path)
            first, reader = reader is None, LogReader(path)
            if first and last_lines is not None:
                reader.skip_to_last(last_lines)
        if reader is not None:
            yield from reader.lines(to_the_end=ended)
        if ended:
            return
        time.sleep(_POLL_S)
