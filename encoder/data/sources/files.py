"""Documents of files, a reader a format. What a reader cannot take from a row it gives as a `BadRow`."""

import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from enc.encoder.data.config import DatasetConfig
from enc.encoder.data.sources.source import (
    DELIMITERS,
    JSON_SUFFIXES,
    PARQUET,
    TEXT_SUFFIXES,
    BadRow,
    Row,
    Source,
    SourceFile,
    Text,
    format_of,
    listed,
)
from enc.encoder.data.sources.streams import Line, decode, read_lines, read_whole, refuse_utf16
from enc.encoder.data.sources.tables import as_text, read_parquet, text_column
from enc.encoder.errors import UsageError

Reader = Callable[[Path, DatasetConfig], Iterator[Row]]


def read_files(source: Source, files: Sequence[SourceFile], dataset: DatasetConfig) -> Iterator[Row]:
    done = 0
    for file in files:
        path = Path(source.location, file.name)
        try:
            for row in _reader(path)(path, dataset):
                yield row._replace(position=done + min(row.position, file.size))
        except OSError as error:
            raise UsageError(f"Cannot read {path}: {error.strerror or error}.") from error
        done += file.size


def _reader(path: Path) -> Reader:
    """Return the reader of a file's format; one that was named itself, whatever its ending, is plain text."""
    file_format = format_of(path.name)
    return _READERS[file_format.suffix] if file_format else _read_text


def _read_text(path: Path, dataset: DatasetConfig) -> Iterator[Row]:
    if dataset.text_unit == "file":
        data = read_whole(path)
        refuse_utf16(data, path)
        yield _text_row(Line(data, 0, sys.maxsize), path)
        return
    for line in read_lines(path):
        if not line.offset:
            refuse_utf16(line.data, path)
        row = _text_row(line, path)
        yield row._replace(text=row.text.rstrip("\r\n")) if isinstance(row, Text) else row


def _text_row(line: Line, path: Path) -> Row:
    try:
        return Text(decode(line, path), line.position)
    except UsageError as error:
        return BadRow(str(error), line.position)


def _read_json_lines(path: Path, dataset: DatasetConfig) -> Iterator[Row]:
    column: str | None = None
    for number, line in enumerate(read_lines(path), start=1):
        where = f"{path}, line {number}"
        try:
            raw = decode(line, path)
            row = _json_row(raw, where) if raw.strip() else None
        except UsageError as error:
            yield BadRow(str(error), line.position)
            continue
        if row is None:
            continue
        column = column or text_column(row, dataset, where)
        yield from _column_of(row, column, where, line.position, check="\\u" in raw)


def _column_of(row: dict[str, Any], column: str, where: str, position: int, check: bool = False) -> Iterator[Row]:
    """Yield the text of a row's column; nothing where it is null."""
    try:
        if column not in row:
            raise UsageError(f"{where}: no column {column!r}; this line has {listed(row)}.")
        text = as_text(row[column], column, where)
        if check and text is not None:
            _refuse_surrogates(text, where)
    except UsageError as error:
        yield BadRow(str(error), position)
        return
    if text is not None:
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


class _Decoded:
    """The lines of a file as text, for `csv`, which does not say how far it has read."""

    def __init__(self, path: Path) -> None:
        self._path, self._lines = path, read_lines(path)
        self.position = 0

    def __iter__(self) -> "_Decoded":
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.position = line.position
        return decode(line, self._path)


def _read_delimited(path: Path, dataset: DatasetConfig) -> Iterator[Row]:
    """Read a table with a header; fields may be quoted, and hold line breaks then."""
    file_format = format_of(path.name)
    assert file_format is not None
    csv.field_size_limit(sys.maxsize)
    lines = _Decoded(path)
    rows = csv.reader(lines, delimiter=DELIMITERS[file_format.suffix], strict=True)
    header: list[str] = []
    column = ""
    while (fields := _next_fields(rows, path)) is not None:
        where = f"{path}, line {rows.line_num}"
        if isinstance(fields, UsageError):
            yield BadRow(str(fields), lines.position)
        elif not fields:
            continue
        elif not header:
            header, column = fields, text_column(fields, dataset, where)
        elif len(fields) != len(header):
            yield BadRow(f"{where}: {len(fields)} fields, the header has {len(header)}.", lines.position)
        else:
            yield Text(fields[header.index(column)], lines.position)


def _next_fields(rows: Any, path: Path) -> list[str] | UsageError | None:
    try:
        return next(rows, None)
    except csv.Error as error:
        return UsageError(
            f"{path}, line {rows.line_num}: {error}. A quote inside of a quoted field is written twice, and a field "
            "with a line break is quoted."
        )
    except UsageError as error:  # of decoding a line
        return error


_READERS: dict[str, Reader] = {
    PARQUET: read_parquet,
    **dict.fromkeys(DELIMITERS, _read_delimited),
    **dict.fromkeys(JSON_SUFFIXES, _read_json_lines),
    **dict.fromkeys(TEXT_SUFFIXES, _read_text),
}
