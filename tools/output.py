"""New files and folders that are there whole or not at all: written beside their place, then renamed."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from enc.encoder.checkpoints.folder import free_bytes_missing
from enc.encoder.errors import RunError, UsageError
from enc.encoder.files import fsync_directory


@contextmanager
def new_output(out: Path, num_bytes: int, folder: bool = True, replaced: bool = False) -> Iterator[Path]:
    """Give a place to write to; it becomes `out` at the end of the block, and is removed when the block fails.

    The place lies in a folder beside `out` that is made here under a name of its own, so nothing else is removed. With
    `replaced` the folder that is at `out` goes when the new one is whole.

    Raises:
        UsageError: `out` is taken or cannot be made, or the disk has no room for `num_bytes`. Nothing was written.
        RunError: Writing failed.
    """
    if not replaced:
        refuse_taken(out, folder)
    missing = free_bytes_missing(out.parent, num_bytes, 0)
    if missing:
        raise UsageError(
            f"The disk of {out} has no room for {num_bytes / 1e9:.2f} GB: {missing / 1e9:.2f} GB are missing. Nothing "
            "was written. Free some space, or choose a place on another disk."
        )
    made = [parent for parent in out.absolute().parents if not parent.exists()]
    staging = _staging(out.absolute(), made)
    partial = staging / out.absolute().name
    try:
        if folder:
            partial.mkdir()
        yield partial
        _take_place(partial, out, folder, staging / f"{out.name}.old" if replaced else None)
        fsync_directory(out.parent)
    except OSError as error:
        raise RunError(
            f"{out} could not be written and was removed again: {error}. Mend the cause and repeat."
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        _remove_empty(made)


def _take_place(partial: Path, out: Path, folder: bool, old: Path | None) -> None:
    """Rename to `out`; what is there goes to `old`, and comes back when that fails."""
    if old:
        out.rename(old)
    try:
        refuse_taken(out, folder)
        partial.rename(out)  # takes the place of an empty folder
    except BaseException:
        if old:
            old.rename(out)
        raise


def _staging(out: Path, made: list[Path]) -> Path:
    """Make the folder beside `out` that is written to."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{out.name[:40]}.", dir=out.parent))
    except OSError as error:
        _remove_empty(made)
        raise UsageError(f"{out} cannot be made ({error.strerror}). Choose another place.") from None


def _remove_empty(folders: list[Path]) -> None:
    with contextlib.suppress(OSError):  # not made, or something is in it
        for folder in folders:
            folder.rmdir()


DTYPES = ("fp32", "bf16")  # that exported weights can have


def refuse_dtype(dtype: str) -> None:
    """Raise UsageError unless weights can be written in a dtype."""
    if dtype not in DTYPES:
        raise UsageError(f"--dtype is {dtype!r}; allowed: {', '.join(DTYPES)}.")


def replaces_export(out: Path, force: bool) -> bool:
    """Tell whether an export at `out` is to be replaced. Raises UsageError when `out` is taken otherwise."""
    export = not out.is_symlink() and all((out / name).is_file() for name in ("config.json", "model.safetensors"))
    if export and not force:
        raise UsageError(f"{out} is an export already. Give --force to replace it, or --out for another place.")
    if not export:
        refuse_taken(out)
    return export


def refuse_taken(out: Path, folder: bool = True) -> None:
    """Raise UsageError unless `out` is free; an empty folder is free for a folder."""
    try:
        _refuse_taken(out, folder)
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise UsageError(f"{out} cannot be made ({error.strerror}). Choose another place.") from None


def _refuse_taken(out: Path, folder: bool) -> None:
    if out.absolute().name in ("", ".."):
        raise UsageError(f"{out} is no name for something new. Choose another place.")
    if out.is_symlink():
        raise UsageError(f"{out} is a symbolic link, which is not replaced. Name the place that is meant.")
    empty_folder = folder and out.is_dir() and not any(out.iterdir())
    if out.exists() and not empty_folder:
        kind = "exists and is not empty" if folder and out.is_dir() else "exists"
        raise UsageError(f"{out} {kind}. Choose another place, or remove it first.")
    blocked = next(p for p in [out.parent, *out.absolute().parent.parents] if p.exists())
    if not blocked.is_dir():
        raise UsageError(f"{out} lies below {blocked}, which is a file. Choose another place.")
