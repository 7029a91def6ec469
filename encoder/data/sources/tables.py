"""Documents of Parquet and Arrow files and of hub datasets."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from enc.encoder.data.config import DatasetConfig
from enc.encoder.data.sources.source import (
    IDS_COLUMN,
    PYTHON_DOCS,
    TEXT_COLUMNS,
    BadRow,
    Row,
    Source,
    Text,
    Tokens,
    listed,
)
from enc.encoder.data.sources.splits import refuse_splits
from enc.encoder.errors import UsageError


def read_parquet(path: Path, dataset: DatasetConfig) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        column = text_column(file.schema_arrow.names, dataset, str(path))
        size, rows, seen = path.stat().st_size, max(1, file.metadata.num_rows), 0
        for batch in file.iter_batches(batch_size=256, columns=[column]):
            for value in batch.column(0).to_pylist():
                seen += 1
                yield from _cell(value, column, f"{path}, row {seen - 1}", size * seen // rows)
    except pyarrow.ArrowException as error:
        raise UsageError(f"{path} is not a readable Parquet file: {error}") from error


def as_text(value: object, column: str, where: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise UsageError(f"{where}: column {column!r} holds {type(value).__name__}, not text. Set dataset.text_column.")


def _cell(value: object, column: str, where: str, position: int) -> Iterator[Row]:
    """Yield the text of a cell; nothing where it is null."""
    try:
        text = as_text(value, column, where)
    except UsageError as error:
        yield BadRow(str(error), position)
        return
    if text is not None:
        yield Text(text, position)


def text_column(columns: Iterable[str], dataset: DatasetConfig, where: str) -> str:
    """Return the column that holds the text: the first of `dataset.text_column` that is there.

    Raises:
        UsageError: there is no such column.
    """
    names, asked = list(columns), dataset.text_column or []
    asked = [asked] if isinstance(asked, str) else asked
    for name in asked or TEXT_COLUMNS:
        if name in names:
            return name
    looked_for = repr(asked[0]) if len(asked) == 1 else "any of " + listed(asked or TEXT_COLUMNS)
    raise UsageError(
        f"{where}: no column {looked_for}; it has {listed(names)}. Set dataset.text_column to the one with text."
    )


def arrow_split(location: str, split: str | None) -> Any:
    import datasets

    try:
        loaded = datasets.load_from_disk(location)
    except (OSError, ValueError) as error:
        raise UsageError(f"{location} cannot be opened as a datasets.save_to_disk folder: {error}") from error
    except IndexError as error:  # what `datasets` makes of a folder without a row
        raise UsageError(f"No usable document: {location} has no rows. Name another source.") from error
    loaded = loaded.with_format(None)  # the folder remembers a format and columns, which are not for us
    if isinstance(loaded, datasets.Dataset):
        if split and split != "train":
            refuse_splits(Source("arrow", location), split)
        return loaded
    wanted = split or ("train" if "train" in loaded else next(iter(loaded)) if len(loaded) == 1 else "train")
    base, _, piece = wanted.partition("[")
    if base not in loaded:
        raise UsageError(
            f"{location} has no split {base!r}; it has {listed(loaded)}. Set dataset.train_split and "
            f"dataset.eval_split."
        )
    return _slice_rows(loaded[base], wanted, location) if piece else loaded[base]


def _slice_rows(rows: Any, split: str, location: str) -> Any:
    """Apply the slice of a name like train[:90%], with the rules of `datasets`."""
    from datasets import ReadInstruction

    try:
        parts = ReadInstruction.from_spec(split).to_absolute({split.partition("[")[0]: len(rows)})
    except (AssertionError, ValueError) as error:
        raise UsageError(f"Cannot take {split!r} from {location}: {error}") from error
    picked = [index for part in parts for index in range(part.from_ or 0, len(rows) if part.to is None else part.to)]
    return rows.select(picked)


def hub_split(name: str, dataset: DatasetConfig, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, dataset.config, split=split, cache_dir=dataset.cache_dir)
    except Exception as error:  # the hub's client raises errors of several network libraries; all mean the same here
        raise UsageError(
            f"Cannot load the dataset {name!r}{f' ({dataset.config})' if dataset.config else ''}, split {split!r}, "
            f"from the hub or its cache: {' '.join(str(error).split())} Check the name, the config and the network, or "
            f"give a local file or folder in dataset.path, or use dataset.name={PYTHON_DOCS}, which needs neither."
        ) from error


def read_table(rows: Any, dataset: DatasetConfig, location: str) -> Iterator[Row]:
    columns = rows.column_names
    if IDS_COLUMN in columns and not dataset.text_column and not set(TEXT_COLUMNS).intersection(columns):
        if dataset.min_text_length > 1:
            raise UsageError(
                f"{location} holds ids of tokens, which have no characters to count: leave dataset.min_text_length at "
                "1."
            )
        yield from _read_ids(rows, location)
        return
    column = text_column(columns, dataset, location)
    for index, value in _column_values(rows, column):
        yield from _cell(value, column, f"{location}, row {index}", index + 1)


def _column_values(rows: Any, column: str) -> Iterator[tuple[int, Any]]:
    batches = rows.select_columns([column]).iter(batch_size=256) if len(rows) else ()  # of none it is an IndexError
    return enumerate(value for batch in batches for value in batch[column])


def _read_ids(rows: Any, location: str) -> Iterator[Row]:
    for index, value in _column_values(rows, IDS_COLUMN):
        ids = np.array([] if value is None else value)
        if ids.ndim != 1 or (len(ids) and ids.dtype.kind not in "iu"):
            yield BadRow(f"{location}, row {index}: column {IDS_COLUMN!r} is no list of whole numbers.", index + 1)
        elif len(ids):
            yield Tokens(ids.astype(np.int64), index + 1)
