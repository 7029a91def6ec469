"""How far something is that takes longer than two seconds: a bar on a terminal, else a line now and then.

    with shown("Tokenising") as show:
        show(done, total, "1,234 tokens")

Where the note counts, `done` and `total` need not be what people count by, and only their share is told. What is begun
inside of another one takes its place until it ends. All of it goes to stderr.
"""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from enc.encoder.files import replace_atomically
from enc.encoder.quantities import span

if TYPE_CHECKING:
    from rich.progress import Progress


class Show(Protocol):
    """Takes note of how much of how much is done, or of a count in words."""

    def __call__(self, done: int, total: int | None = None, note: str = "") -> None: ...


_PATIENCE_S, _BETWEEN_LINES_S, _REDRAWN_S = 1.0, 20.0, 0.25
NOTE_FILE = ".doing"  # in a run folder: the newest line, for whoever looks from outside


@dataclass(frozen=True)
class Piece:
    """A piece of work at one moment."""

    title: str
    done: int = 0
    total: int | None = None
    note: str = ""
    began: float = field(default_factory=time.monotonic)

    def line(self, now: float) -> str:
        """Return all that is known in one line: how much of how much, for how long, how long still."""
        share = f"{self.done / self.total:.0%}" if self.total else ""
        counted = f"{self.done:,}" + (f" of {self.total:,} ({share})" if self.total else "")
        parts = [share, self.note] if self.note else [counted] if self.done else []
        parts = [part for part in parts if part]
        took = now - self.began
        parts.append(span(took))
        if self.total and 0 < self.done < self.total:
            parts.append(f"about {span(took * (self.total - self.done) / self.done)} left")
        return f"{self.title}: {', '.join(parts)}"


class Display:
    """Shows the present piece of work from a thread of its own: the work may be one long call."""

    def __init__(self, piece: Piece, folder: Path | None) -> None:
        self.piece, self.folder = piece, folder
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.ended.set()
        self.thread.join()
        if self.folder is not None:
            (self.folder / NOTE_FILE).unlink(missing_ok=True)

    def _run(self) -> None:
        if self.ended.wait(_PATIENCE_S):
            return
        if sys.stderr.isatty():
            self._draw()
        else:
            self._write_lines()

    def _draw(self) -> None:
        with _bar() as bar:
            task = bar.add_task("", total=None, title="", note="")
            while True:
                piece = self.piece
                self._leave_note()
                bar.update(
                    task, completed=piece.done, total=piece.total, title=piece.title, note=piece.line(time.monotonic())
                )
                if self.ended.wait(_REDRAWN_S):
                    return

    def _write_lines(self) -> None:
        while True:
            self._leave_note()
            if self.ended.wait(_BETWEEN_LINES_S):
                return
            print(self.piece.line(time.monotonic()), file=sys.stderr, flush=True)

    def _leave_note(self) -> None:
        if self.folder is not None and self.folder.is_dir():
            replace_atomically(self.folder / NOTE_FILE, self.piece.line(time.monotonic()))


_open: Display | None = None


@contextmanager
def shown(title: str, folder: Path | None = None) -> Iterator[Show]:
    """Show how far a piece of work is, until it ends; in `folder` its newest line is left for `enc status`."""
    global _open
    outer, before = _open, _open.piece if _open else None
    display = outer or Display(Piece(title), folder)
    _open, display.piece = display, Piece(title)

    def show(done: int, total: int | None = None, note: str = "") -> None:
        display.piece = replace(display.piece, done=done, total=total, note=note)

    try:
        yield show
    finally:
        _open = outer
        if before is None:
            display.close()
        else:
            display.piece = before


def _bar() -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (BarColumn(bar_width=12), TextColumn("{task.fields[note]}"))
    return Progress(*columns, console=Console(stderr=True, highlight=False), transient=True)
