"""Files that must be right: JSON, replaced in one go, checksums, directories flushed to disk (no torch)."""

import json
import os
from pathlib import Path
from typing import Any

import xxhash

_READ_BYTES = 8 * 2**20
_LFS_POINTER = b"version https://git-lfs"


def read_json(path: Path) -> Any:
    """Return the content of a JSON file. Raises OSError, or ValueError when it is not JSON in UTF-8."""
    return json.loads(path.read_text(encoding="utf-8"))


def json_text(content: Any, indent: int = 1) -> str:
    """Return what a JSON file for people to read holds: indented, in UTF-8, with a line's end."""
    return json.dumps(content, indent=indent, ensure_ascii=False) + "\n"


def write_json(path: Path, content: Any, indent: int = 1) -> None:
    path.write_text(json_text(content, indent), encoding="utf-8")


def replace_atomically(path: Path, content: str | bytes, *, flush: bool = False, shared: bool = False) -> None:
    """Write a file so that it is either the old or the whole new one; with `flush` on disk when this returns.

    With `shared` several processes may do it at a time, of which the last one wins. Without, what a killed process
    leaves is written over by the next.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp" if shared else f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            if flush:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_json_safely(path: Path, content: Any) -> None:
    """Replace a JSON file in one go; it is on disk when this returns."""
    replace_atomically(path, json_text(content), flush=True)


def file_checksum(path: Path) -> str:
    """Return the xxh3_64 of a file as 16 hexadecimal digits."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def lfs_advice(path: Path) -> str | None:
    """Return what to do about a pointer of Git LFS in the place of a file; None for another file."""
    try:
        with path.open("rb") as file:
            is_pointer = file.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError:
        return None
    return f"{path} is a pointer of Git LFS, not the file itself. Fetch it with `git lfs pull`." if is_pointer else None


def fsync_directory(path: Path) -> None:
    """Flush a directory's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
