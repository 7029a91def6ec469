"""Documents of text and JSON files."""

import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from enc.encoder.data.config import DatasetConfig
from enc.encoder.data.sources.source import JSON_SUFFIXES, PARQUET_SUFFIXES, Source, SourceFile, Text, listed
from enc.encoder.data.sources.tables import as_text, read_parquet, text_column
from enc.encoder.errors import UsageError


def read_files(source: Source, files: Sequence[SourceFile], dataset: DatasetConfig) -> Iterator[Text]:
    done = 0
    for file in files:
        path = Path(source.location, file.name)
        try:
            for text, position in _reader(path)(path, dataset):
                yield Text(text, done + min(position, file.size))
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UsageError(f"{path} is damaged: {error}. Replace it or take it out of the source.") from error
        except OSError as error:
            raise UsageError(f"Cannot read {path}: {error.strerror or error}.") from error
        done += file.size


def _reader(path: Path) -> Callable[[Path, DatasetConfig], Iterator[Text]]:
    stem = path.name.removesuffix(".gz")
    if stem.endswith(PARQUET_SUFFIXES):
        return read_parquet
    return _read_json_lines if stem.endswith(JSON_SUFFIXES) else _read_text


def _lines(path: Path) -> Iterator[tuple[bytes, int]]:
    """Yield the lines of a plain or gzipped file, with the offset in the file on disk that was read so far."""
    with path.open("rb") as raw:
        stream = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if path.suffix == ".gz" else raw
        for line in stream:
            yield line, raw.tell()


def _decode(data: bytes, path: Path, offset: int) -> str:
    try:
        return data.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {offset + error.start}"
            f"{' of the unpacked text' if path.suffix == '.gz' else ''}. Convert the file "
            "(iconv -f LATIN1 -t UTF-8) or take it out of the source."
        ) from error


def _read_text(path: Path, dataset: DatasetConfig) -> Iterator[Text]:
    if dataset.text_unit == "file":
        with path.open("rb") as raw:
            data = gzip.GzipFile(fileobj=raw).read() if path.suffix == ".gz" else raw.read()
        yield Text(_decode(data, path, 0), sys.maxsize)
        return
    offset = 0
    for line, position in _lines(path):
        yield Text(_decode(line, path, offset).rstrip("\r\n"), position)
        offset += len(line)


def _read_json_lines(path: Path, dataset: DatasetConfig) -> Iterator[Text]:
    offset = 0
    column: str | None = None
    for number, (line, position) in enumerate(_lines(path), start=1):
        raw, where = _decode(line, path, offset), f"{path}, line {number}"
        offset += len(line)
        if not raw.strip():
            continue
        row = _json_row(raw, where)
        if column is None:
            column = text_column(row, dataset.text_column, where)
        if column not in row:
            raise UsageError(f"{where}: no column {column!r}; this line has {listed(row)}.")
        if (text := as_text(row[column], column, where)) is not None:
            if "\\u" in raw:
                _refuse_surrogates(text, where)
            yield Text(text, position)


def _json_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{where} is not JSON ({error}). A .jsonl or .json source holds one JSON object on each line; a file "
            "with one big array has to be rewritten that way (jq -c '.[]')."
        ) from error
    if not isinstance(row, dict):
        raise UsageError(f"{where} holds a JSON {type(row).__name__}, not an object. Write one object on each line.")
    return row


def _refuse_surrogates(text: str, where: str) -> None:
    """An escape like \\ud83d without its second half is valid JSON but no character, and no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{where}: half a surrogate pair at character {error.start}. Repair or drop this line."
        ) from error
