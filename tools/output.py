"""New files and folders that are there whole or not at all: written beside their place, then renamed."""

import contextlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from enc.encoder.checkpoint import free_bytes_missing
from enc.encoder.errors import RunError, UsageError
from enc.encoder.files import fsync_directory


@contextmanager
def new_output(out: Path, num_bytes: int, folder: bool = True) -> Iterator[Path]:
    """Give a place to write to; it becomes `out` at the end of the block, and is removed when the block fails.

    Raises:
        UsageError: `out` is taken, or the disk has no room for `num_bytes`. Nothing was written.
        RunError: Writing failed.
    """
    refuse_taken(out, folder)
    missing = free_bytes_missing(out.parent, num_bytes, 0)
    if missing:
        raise UsageError(
            f"The disk of {out} has no room for {num_bytes / 1e9:.2f} GB: {missing / 1e9:.2f} GB are missing. Nothing "
            "was written. Free some space, or choose a place on another disk."
        )
    partial = out.absolute().with_name(f".{out.absolute().name}.tmp")
    _remove(partial)
    made = [parent for parent in out.absolute().parents if not parent.exists()]
    try:
        (partial if folder else partial.parent).mkdir(parents=True, exist_ok=True)
        yield partial
        if out.is_dir():
            out.rmdir()
        partial.rename(out)
        fsync_directory(out.parent)
    except OSError as error:
        raise RunError(
            f"{out} could not be written and was removed again: {error}. Mend the cause and repeat."
        ) from None
    finally:
        _remove(partial)
        if not out.exists():
            with contextlib.suppress(OSError):  # not made, or somebody else has put something there
                for parent in made:
                    parent.rmdir()


def refuse_taken(out: Path, folder: bool = True) -> None:
    """Raise UsageError unless `out` is free; an empty folder is free for a folder."""
    empty_folder = folder and out.is_dir() and not any(out.iterdir())
    if out.exists() and not empty_folder:
        kind = "exists and is not empty" if folder and out.is_dir() else "exists"
        raise UsageError(f"{out} {kind}. Choose another place, or remove it first.")
    blocked = next(p for p in [out.parent, *out.absolute().parent.parents] if p.exists())
    if not blocked.is_dir():
        raise UsageError(f"{out} lies below {blocked}, which is a file. Choose another place.")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
