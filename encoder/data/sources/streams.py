"""Lines of files as they are on disk: plain, or packed by gzip, bzip2, xz or Zstandard."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from enc.encoder.data.sources.source import format_of
from enc.encoder.errors import UsageError

_BLOCK = 2**20


class Line(NamedTuple):
    """A line with its end, where it begins in the unpacked file, and how much of the file on disk was read for it."""

    data: bytes
    offset: int
    position: int


def read_lines(path: Path) -> Iterator[Line]:
    """Yield the lines of a file, which end at \\n alone."""
    offset = 0
    with path.open("rb") as raw, _unpacked(path, raw) as stream:
        for data in stream:
            yield Line(data, offset, raw.tell())
            offset += len(data)


def read_whole(path: Path) -> bytes:
    """Return the unpacked content of a file."""
    with path.open("rb") as raw, _unpacked(path, raw) as stream:
        return stream.read()


@contextmanager
def _unpacked(path: Path, raw: BinaryIO) -> Iterator[BinaryIO]:
    """Give what a packed file holds; what cannot be unpacked is a UsageError, also while the stream is read."""
    try:
        yield _unpacker(path, raw)
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise _damaged(path, error) from error
    except OSError as error:
        if error.errno is None:  # nothing that the system said: the unpackers raise these themselves
            raise _damaged(path, error) from error
        raise


def _unpacker(path: Path, raw: BinaryIO) -> BinaryIO:
    file_format = format_of(path.name)
    compression = file_format.compression if file_format else ""
    if compression == ".zst":
        import pyarrow

        packed = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd")
        return cast(BinaryIO, io.BufferedReader(packed, _BLOCK))
    openers: dict[str, Callable[[BinaryIO], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return cast(BinaryIO, openers[compression](raw)) if compression else raw


def _damaged(path: Path, error: Exception) -> UsageError:
    return UsageError(f"{path} is damaged: {error}. Replace it or take it out of the source.")


def decode(line: Line, path: Path) -> str:
    """Return the text of a line, without a byte order mark.

    Raises:
        UsageError: it is not UTF-8.
    """
    try:
        return line.data.decode("utf-8-sig" if line.offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        file_format = format_of(path.name)
        unpacked = " of the unpacked text" if file_format and file_format.compression else ""
        raise UsageError(
            f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {line.offset + error.start}"
            f"{unpacked}. Convert the file (iconv -f LATIN1 -t UTF-8) or take it out of the source."
        ) from error


def refuse_utf16(data: bytes, path: Path) -> None:
    """Refuse a file whose beginning is UTF-16, which without its mark could pass for text full of NULs."""
    head = data[:256]
    marked = head.startswith((b"\xff\xfe", b"\xfe\xff"))
    if marked or (len(head) > 3 and 3 * head.count(0) > len(head) and b"\0\0" not in head):
        raise UsageError(
            f"{path} is UTF-16. Convert the file (iconv -f UTF-16{'' if marked else 'LE or UTF-16BE'} -t UTF-8) or "
            "take it out of the source."
        )
