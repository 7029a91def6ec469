"""Files that must be right: their checksum, and directories flushed to disk (no torch)."""

import os
from pathlib import Path

import xxhash

_READ_BYTES = 8 * 2**20


def file_checksum(path: Path) -> str:
    """Return the xxh3_64 of a file as 16 hexadecimal digits."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def fsync_directory(path: Path) -> None:
    """Flush a directory's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
