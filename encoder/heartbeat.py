"""What a rank is doing, in a small file that others can read while it runs: how hangs are noticed and explained.

    <run>/logs/<attempt>/ranks/<rank>.json
        rank host pid time    who wrote it, and when (Unix seconds)
        phase step marks      what the main thread does; `marks` grows with every change of phase
        step_s save_s         mean seconds a step, longest save so far
        last_phase code error lost_peer   with phase `ended`: how the process left

A thread of its own writes it: a file that is fresh but whose `marks` stand still means a main thread that waits;
one that is old means a process that is stopped or gone. No torch.
"""

import contextlib
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from enc.encoder.files import read_json, replace_atomically


def rank_file(run_dir: Path, attempt: int, rank: int) -> Path:
    """Return the path of a rank's file."""
    return run_dir / "logs" / str(attempt) / "ranks" / f"{rank}.json"


def host_name() -> str:
    """Return the name that whoever started this rank knows its machine by; a scheduler may have one of its own."""
    return os.environ.get("ENC_NODE_NAME") or socket.gethostname()


class Heartbeat:
    """Writes this rank's file every few seconds until it is told how the process ends."""

    def __init__(self, path: Path, rank: int, every_s: float) -> None:
        self.path, self.every_s = path, every_s
        self.step, self.marks, self.phase = 0, 0, "start"
        self.step_s: float | None = None
        self.save_s: float | None = None
        self.identity = {"rank": rank, "host": host_name(), "pid": os.getpid()}
        self.lock, self.done = threading.Lock(), threading.Event()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._write()
        threading.Thread(target=self._tick, daemon=True).start()

    def mark(self, phase: str) -> None:
        """Say that the main thread begins with something."""
        self.phase = phase
        self.marks += 1

    def took(self, save_s: float) -> None:
        """Take note of how long a save took."""
        self.save_s = max(self.save_s or 0.0, save_s)

    def end(self, code: int, error: str | None = None, lost_peer: bool = False) -> None:
        """Write the last word: exit code, and the error if there was one."""
        self.done.set()
        last_phase = self.phase
        self.mark("ended")
        self._write(last_phase=last_phase, code=code, error=error, lost_peer=lost_peer)

    def _tick(self) -> None:
        while not self.done.wait(self.every_s):
            self._write()

    def _write(self, **more: Any) -> None:
        now = {"time": time.time(), "phase": self.phase, "step": self.step, "marks": self.marks}
        times = {"step_s": self.step_s, "save_s": self.save_s}
        with self.lock:
            if self.done.is_set() and not more:
                return
            write_rank_file(self.path, self.identity | now | times | more)


def write_rank_file(path: Path, content: dict[str, Any]) -> None:
    """Replace a rank's file in one go; a disk that is full must not stop a run for its sake."""
    with contextlib.suppress(OSError):
        replace_atomically(path, json.dumps(content) + "\n", shared=True)


def note_rank(run_dir: Path, attempt: int, rank: int, **more: Any) -> None:
    """Write into a rank's file for it: a first word, or the last one of a rank that was killed."""
    path = rank_file(run_dir, attempt, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    unknown = {"rank": rank, "host": host_name(), "pid": os.getpid(), "phase": "start", "step": 0, "marks": 0}
    write_rank_file(path, {**(read_rank_file(path) or unknown), "time": time.time(), **more})


def read_rank_file(path: Path) -> dict[str, Any] | None:
    """Return what a rank last said of itself; None when that cannot be read."""
    try:
        content = read_json(path)
        return {**content, "rank": int(path.stem)} if isinstance(content, dict) else None
    except (OSError, ValueError, RecursionError):
        return None


def read_rank_files(run_dir: Path, attempt: int) -> dict[int, dict[str, Any]]:
    """Return what the ranks of an attempt last said of themselves, by rank; one that cannot be read is left out."""
    paths = rank_file(run_dir, attempt, 0).parent.glob("*.json")
    found = [content for content in map(read_rank_file, paths) if content is not None]
    return {content["rank"]: content for content in sorted(found, key=lambda content: content["rank"])}
