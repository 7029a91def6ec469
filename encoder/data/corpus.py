"""Where text comes from: every source becomes one stream of documents, each marked "train", "eval" or "test".

    dataset section ──resolve_source, held_out_sources──▶ Source (what is read: value, no text opened)
                    ──read_documents──▶ Document, Document, …  (in one fixed order, a document at a time)

A source is a file, a folder or a glob of text, JSON lines and Parquet files; a folder written by
`datasets.save_to_disk`; a dataset of the Hugging Face hub; or `python-docs`, the documentation inside the running
Python, which needs no network. Neither torch, transformers nor (for local files) datasets is imported here.
"""

from __future__ import annotations

import ast
import gzip
import json
import os
import re
import sys
import sysconfig
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, cast

from enc.encoder.errors import UsageError

if TYPE_CHECKING:
    from enc.encoder.data.config import DatasetConfig

PYTHON_DOCS = "python-docs"
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".text")
JSON_SUFFIXES = (".jsonl", ".json")
PARQUET_SUFFIXES = (".parquet",)
FILE_SUFFIXES = tuple(s + z for s in TEXT_SUFFIXES + JSON_SUFFIXES for z in ("", ".gz")) + PARQUET_SUFFIXES
TEXT_COLUMNS = ("text", "sentence", "content")
SPLITS = ("train", "eval", "test")
HELD_OUT_FILES = {"eval": "validation_file", "test": "test_file"}  # split -> key of its own source
SPLIT_BLOCK = 4096  # documents that share one keyed generator: seeding one for each document costs more than reading it


class Text(NamedTuple):
    """A text as its source gives it, and how far into the source it ends (`Source.unit`)."""

    text: str
    position: int


class Document(NamedTuple):
    """A usable document: its split (one of SPLITS), its text, and how far into the sources it ends."""

    split: str
    text: str
    position: int


@dataclass(frozen=True)
class SourceFile:
    """A file of a source: path relative to the source's root, size in bytes, modification time in ns."""

    name: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Source:
    """What `dataset.name` or `dataset.path` stands for, found by listing folders and without opening a text.

    `kind` is "files", "arrow" (a `save_to_disk` folder), "hub", "python-docs" or "store" (an already built token
    store). `location` is the root folder, the hub name, or the Python version.
    """

    kind: str
    location: str
    files: tuple[SourceFile, ...] = ()

    @property
    def place(self) -> str:
        """What to call the source in a message: its only file, or its root."""
        return str(Path(self.location, self.files[0].name)) if len(self.files) == 1 else self.location

    @property
    def unit(self) -> str:
        """What positions and totals count: "bytes" of local files, else "documents"."""
        return "bytes" if self.kind == "files" else "documents"

    @property
    def total_bytes(self) -> int | None:
        """Bytes on disk of all files of the source; None when it has no files."""
        return sum(file.size for file in self.files) if self.files else None

    @property
    def paths(self) -> list[Path]:
        """The files of the source."""
        return [Path(self.location, file.name) for file in self.files]

    def describe(self) -> dict[str, Any]:
        """Return the JSON description by which a store recognises its source: files by name, size and time."""
        files = {file.name: [file.size, file.mtime_ns] for file in self.files}
        return {"kind": self.kind, "location": self.location, "files": files}


# ------------------------------------------------------------------------------------------------- finding the source


def resolve_source(dataset: DatasetConfig) -> Source:
    """Return the source that a dataset section names; `path` wins over `name`.

    Raises:
        UsageError: the path does not exist or holds nothing that can be read.
    """
    if dataset.path:
        return _local_source(str(dataset.path), "dataset.path")
    name = str(dataset.name or "")
    if name == PYTHON_DOCS:
        return Source("python-docs", ".".join(map(str, sys.version_info[:3])))
    if not name:
        raise UsageError(
            "No text to read: dataset.name and dataset.path are both empty. Set dataset.path to a file, a folder or a "
            f"glob of text, or dataset.name to a hub dataset or to {PYTHON_DOCS!r}."
        )
    if _looks_local(name):
        return _local_source(name, "dataset.name")
    return Source("hub", name)


def held_out_sources(source: Source, dataset: DatasetConfig) -> dict[str, Source]:
    """Return the sources of their own that "eval" and "test" have: `validation_file` and `test_file`.

    Raises:
        UsageError: one does not exist, holds nothing that can be read, or is part of what is trained on of `source`.
    """
    found = {}
    for split, key in HELD_OUT_FILES.items():
        if name := getattr(dataset, key):
            found[split] = _local_source(name, f"dataset.{key}")
            if found[split].kind == "store":
                raise UsageError(f"dataset.{key}: {name} is a token store, which holds no text to read. Name a text.")
            _refuse_trained(found[split], source, dataset, f"dataset.{key}")
    return found


def _refuse_trained(held_out: Source, source: Source, dataset: DatasetConfig, key: str) -> None:
    """Raise UsageError when a file that is held out is trained on as well."""
    if source.kind != "files":
        return
    files = _split_files(source, dataset.train_split, dataset.eval_split)
    trained = {Path(source.location, file.name).resolve() for file in files}
    if shared := sorted(trained.intersection(path.resolve() for path in held_out.paths)):
        raise UsageError(
            f"{key}: {shared[0]} is also among the {len(trained)} files to train on, so its numbers would say nothing. "
            f"Move it out of {source.location}, or name the others alone in dataset.path, with a glob."
        )


def _looks_local(name: str) -> bool:
    return (
        name.startswith(("/", ".", "~"))
        or name.count("/") > 1
        or name.endswith(FILE_SUFFIXES)
        or any(c in name for c in "*?[")
        or Path(name).exists()
    )


def _local_source(name: str, key: str) -> Source:
    path = Path(name).expanduser()
    if path.is_dir():
        return _folder_source(path, key)
    if path.is_file():
        if not path.name.endswith(FILE_SUFFIXES):
            raise UsageError(f"{key}: cannot read {path}: its name ends in none of {_words(FILE_SUFFIXES)}.")
        return Source("files", str(path.parent.absolute()), _stat_files(path.parent, [path]))
    if any(c in name for c in "*?["):
        return _glob_source(path, key)
    raise UsageError(
        f"{key}: {path} does not exist (looked in {Path.cwd()}). Give an existing file, folder or glob, or leave "
        "dataset.path empty and put the name of a hub dataset in dataset.name."
    )


def _glob_source(pattern: Path, key: str) -> Source:
    parts = pattern.parts
    first = next(i for i, part in enumerate(parts) if any(c in part for c in "*?["))
    root = Path(*parts[:first])
    matches = sorted(root.glob(str(Path(*parts[first:]))))
    found = [path for path in matches if path.is_file() and "/." not in f"/{path.relative_to(root).as_posix()}"]
    usable = [path for path in found if path.name.endswith(FILE_SUFFIXES)]
    if not usable:
        what = f"matches {len(found)} files, none" if found else "matches no file"
        raise UsageError(f"{key}: {pattern} {what} that ends in one of {_words(FILE_SUFFIXES)}.")
    return Source("files", str(root.absolute()), _stat_files(root, usable))


def _folder_source(folder: Path, key: str) -> Source:
    if is_store(folder):
        return Source("store", str(folder.absolute()))
    found = list(_walk(folder))
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return Source("arrow", str(folder.absolute()), _stat_files(folder, found))
    usable = [path for path in found if path.name.endswith(FILE_SUFFIXES)]
    if not usable:
        others = sorted({"".join(path.suffixes[-2:]) or path.name for path in found})[:8]
        raise UsageError(
            f"{key}: the folder {folder} holds no text: it has {len(found)} files"
            + (f" ({_words(others)})" if others else "")
            + f", and none ends in one of {_words(FILE_SUFFIXES)}."
        )
    return Source("files", str(folder.absolute()), _stat_files(folder, usable))


def is_store(folder: Path) -> bool:
    """Return whether a folder looks like a token store; opening it tells whether it is a good one."""
    return (folder / "manifest.json").is_file() and (folder / "tokenizer").is_dir()


def _walk(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder in sorted order, through links, without hidden ones."""
    seen: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:  # a link that leads back up would never end
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(root, name) for name in sorted(files) if not name.startswith("."))


def _stat_files(root: Path, paths: Iterable[Path]) -> tuple[SourceFile, ...]:
    files = [(path.relative_to(root).as_posix(), path.stat()) for path in paths]
    return tuple(SourceFile(name, stat.st_size, stat.st_mtime_ns) for name, stat in sorted(files))


# ------------------------------------------------------------------------------------------- documents and their splits


def read_documents(source: Source, dataset: DatasetConfig, seed: int) -> Iterator[Document]:
    """Yield the usable documents of a source and of `held_out_sources`, each with its split, always in the same order.

    Sources of their own come first, so that what is wrong with them shows before hours of work. Which documents of
    `source` are held out for evaluation is decided by the first of these that is set: `eval_split` (a split of the
    source), `validation_split` (a fraction, drawn by (seed, "split", index of the document)), `eval_samples` (that many
    from the head). `eval_samples` also caps an evaluation set chosen in another way. The `test_samples` documents that
    follow are held out for the test. At least one document always stays in train.

    Raises:
        UsageError: nothing usable in a split, a missing column or split, or text that cannot be decoded.
    """
    start = 0
    for split, held_out in held_out_sources(source, dataset).items():
        count = 0
        for text, position in _usable(_open_split(held_out, dataset, None), dataset):
            count += 1
            yield Document(split, text, start + position)
        if not count:
            raise UsageError(
                f"dataset.{HELD_OUT_FILES[split]}: no usable document in {held_out.place}: it is empty, or every text "
                f"is shorter than dataset.min_text_length={dataset.min_text_length}. Name another text."
            )
        start += held_out.total_bytes or 0
    counts = dict.fromkeys(SPLITS, 0)
    for split, text, position in _assign_splits(source, dataset, seed):
        counts[split] += 1
        yield Document(split, text, start + position)
    _check_counts(counts, source, dataset)


def _check_counts(counts: dict[str, int], source: Source, dataset: DatasetConfig) -> None:
    if not counts["train"]:
        raise UsageError(
            f"No usable document for training in {source.place}: it is empty, or every text is shorter than "
            f"dataset.min_text_length={dataset.min_text_length} or was held out. Lower min_text_length or the "
            "evaluation share, or add text."
        )
    asked = {"eval": ("eval_split", "validation_split"), "test": ("test_samples",)}
    for split, keys in asked.items():
        setting = next((key for key in keys if getattr(dataset, key)), None)
        if setting and not counts[split]:
            other = ", or set dataset.eval_samples to reserve a fixed number" if split == "eval" else ""
            raise UsageError(
                f"dataset.{setting}={getattr(dataset, setting)} holds out none of the {sum(counts.values())} documents "
                f"of {source.place}. Choose another value{other}."
            )


def source_total(source: Source, dataset: DatasetConfig) -> int | None:
    """Return the last position that `read_documents` reaches, in `Source.unit`; None when only reading would tell."""
    sources = [source, *held_out_sources(source, dataset).values()]
    if any(part.kind != "files" for part in sources):
        return None
    return sum(part.total_bytes or 0 for part in sources)


def _assign_splits(source: Source, dataset: DatasetConfig, seed: int) -> Iterator[Document]:
    usable = _usable(_open_split(source, dataset, dataset.train_split, held_out=dataset.eval_split), dataset)
    cap = sys.maxsize if dataset.eval_samples is None else int(dataset.eval_samples)
    num_test = dataset.test_samples or 0
    if dataset.eval_split:
        end = 0
        for document in _reserve_head(usable, 0, num_test):
            end = document.position
            yield document
        for index, (text, position) in enumerate(_usable(_open_split(source, dataset, dataset.eval_split), dataset)):
            if index >= cap:
                return
            yield Document("eval", text, end + position)
    elif dataset.validation_split:
        yield from _draw_split(usable, float(dataset.validation_split), cap, num_test, seed)
    else:
        yield from _reserve_head(usable, dataset.eval_samples or 0, num_test)


def _draw_split(texts: Iterable[Text], fraction: float, cap: int, num_test: int, seed: int) -> Iterator[Document]:
    from enc.encoder.keyed import numpy_rng  # imports torch, which no other way of splitting needs

    num_eval = 0
    for index, (text, position) in enumerate(texts):
        block, row = divmod(index, SPLIT_BLOCK)
        if row == 0:
            held_out = numpy_rng(seed, "split", block).random(SPLIT_BLOCK) < fraction
        if index < num_test:
            yield Document("test", text, position)
            continue
        is_eval = bool(held_out[row]) and num_eval < cap
        num_eval += is_eval
        yield Document("eval" if is_eval else "train", text, position)


def _reserve_head(texts: Iterable[Text], num_eval: int, num_test: int) -> Iterator[Document]:
    """Hold out the first documents, but never the last one: it is read one ahead to know which that is."""
    pending: Text | None = None
    index = 0
    for text in texts:
        if pending is not None:
            split = "eval" if index < num_eval else "test" if index < num_eval + num_test else "train"
            yield Document(split, *pending)
            index += 1
        pending = text
    if pending is not None:
        yield Document("train", *pending)


def _usable(texts: Iterable[Text], dataset: DatasetConfig) -> Iterator[Text]:
    """Leave out what has fewer than `min_text_length` characters between its outer white space."""
    shortest = max(1, int(dataset.min_text_length))
    return (text for text in texts if len(text.text) >= shortest and len(text.text.strip()) >= shortest)


def _open_split(
    source: Source, dataset: DatasetConfig, split: str | None, held_out: str | None = None
) -> Iterator[Text]:
    if source.kind == "files":
        return _read_files(source, _split_files(source, split, held_out), dataset)
    if source.kind == "arrow":
        return _read_table(_arrow_split(source.location, split), dataset, source.location)
    if source.kind == "hub":
        return _read_table(_hub_split(source.location, dataset, split or "train"), dataset, source.location)
    if source.kind == "python-docs":
        _refuse_splits(source, split or held_out)
        return (Text(text, index + 1) for index, text in enumerate(python_docs()))
    raise UsageError(
        f"{source.location} is a token store, which holds no text to read. Give dataset.path a text source."
    )


def _refuse_splits(source: Source, split: str | None) -> None:
    if split:
        raise UsageError(
            f"{source.location} has no splits, but the config asks for {split!r}. Set dataset.train_split and "
            "dataset.eval_split to null and hold documents out with validation_split or eval_samples."
        )


def _split_files(source: Source, split: str | None, held_out: str | None) -> tuple[SourceFile, ...]:
    """Choose files by the split that a folder or file name has as a word: `validation/a.txt`, `train-00001.jsonl`."""
    if split is None and held_out is None:
        return source.files
    named = {
        name: [file for file in source.files if _names_split(file.name, name)] for name in (split, held_out) if name
    }
    for name, files in named.items():
        if not files:
            raise UsageError(
                f"No file of {source.location} belongs to the split {name!r}: neither a folder nor a file name has it "
                f"as "
                f"a word (like {name}/a.txt or {name}-0.jsonl). Rename the files, or set dataset.train_split and "
                "dataset.eval_split to null and use dataset.validation_split or dataset.eval_samples."
            )
    if split is None:
        return tuple(file for file in source.files if file not in named[str(held_out)])
    return tuple(named[split])


def _names_split(name: str, split: str) -> bool:
    return re.search(rf"(^|[/._-]){re.escape(split)}([/._-]|$)", name) is not None


# -------------------------------------------------------------------------------------------------------- local files


def _read_files(source: Source, files: Sequence[SourceFile], dataset: DatasetConfig) -> Iterator[Text]:
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
        return _read_parquet
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
            raise UsageError(f"{where}: no column {column!r}; this line has {_words(row)}.")
        if (text := _as_text(row[column], column, where)) is not None:
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


def _read_parquet(path: Path, dataset: DatasetConfig) -> Iterator[Text]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        column = text_column(file.schema_arrow.names, dataset.text_column, str(path))
        size, rows, seen = path.stat().st_size, max(1, file.metadata.num_rows), 0
        for batch in file.iter_batches(batch_size=256, columns=[column]):
            for value in batch.column(0).to_pylist():
                seen += 1
                if (text := _as_text(value, column, f"{path}, row {seen - 1}")) is not None:
                    yield Text(text, size * seen // rows)
    except pyarrow.ArrowException as error:
        raise UsageError(f"{path} is not a readable Parquet file: {error}") from error


def _as_text(value: object, column: str, where: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise UsageError(f"{where}: column {column!r} holds {type(value).__name__}, not text. Set dataset.text_column.")


def text_column(columns: Iterable[str], asked: str | None, where: str) -> str:
    """Return the column that holds the text: the asked one, else the first of text, sentence, content.

    Raises:
        UsageError: there is no such column.
    """
    names = list(columns)
    for name in (asked,) if asked else TEXT_COLUMNS:
        if name in names:
            return name
    looked_for = repr(asked) if asked else "any of " + _words(TEXT_COLUMNS)
    raise UsageError(
        f"{where}: no column {looked_for}; it has {_words(names)}. Set dataset.text_column to the one with text."
    )


# --------------------------------------------------------------------------------------------- datasets: disk and hub


def _arrow_split(location: str, split: str | None) -> Any:
    import datasets

    try:
        loaded = datasets.load_from_disk(location)
    except (OSError, ValueError) as error:
        raise UsageError(f"{location} cannot be opened as a datasets.save_to_disk folder: {error}") from error
    if isinstance(loaded, datasets.Dataset):
        if split and split != "train":
            _refuse_splits(Source("arrow", location), split)
        return loaded
    wanted = split or ("train" if "train" in loaded else next(iter(loaded)) if len(loaded) == 1 else "train")
    base, _, piece = wanted.partition("[")
    if base not in loaded:
        raise UsageError(
            f"{location} has no split {base!r}; it has {_words(loaded)}. Set dataset.train_split and "
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


def _hub_split(name: str, dataset: DatasetConfig, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, dataset.config, split=split, cache_dir=dataset.cache_dir)
    except (
        Exception
    ) as error:  # the hub's client raises errors of several network libraries; each one means the same here
        raise UsageError(
            f"Cannot load the dataset {name!r}{f' ({dataset.config})' if dataset.config else ''}, split {split!r}, "
            f"from the "
            f"hub or its cache: {' '.join(str(error).split())} Check the name, the config and the network, or give a "
            f"local file or folder in dataset.path, or use dataset.name={PYTHON_DOCS}, which needs neither."
        ) from error


def _read_table(rows: Any, dataset: DatasetConfig, location: str) -> Iterator[Text]:
    column = text_column(rows.column_names, dataset.text_column, location)
    index = 0
    for batch in rows.select_columns([column]).iter(batch_size=256):
        for value in batch[column]:
            index += 1
            if (text := _as_text(value, column, f"{location}, row {index - 1}")) is not None:
                yield Text(text, index)


# -------------------------------------------------------------------------------------------------------- python-docs


def python_docs() -> Iterator[str]:
    """Yield the help topics and every distinct docstring of the running Python's standard library, in a fixed order.

    The library's files are parsed, never imported: importing some of them opens browsers, prints or needs a display.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    for text in (*(topics[name] for name in sorted(topics)), *_docstrings()):
        if text not in seen:
            seen.add(text)
            yield text


def _docstrings() -> Iterator[str]:
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload"}
    for root, folders, files in os.walk(sysconfig.get_paths()["stdlib"]):
        folders[:] = sorted(set(folders) - skipped)
        for name in sorted(files):
            if name.endswith(".py"):
                yield from _file_docstrings(Path(root, name))


def _file_docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():  # old escapes in library code are not the user's business
            warnings.simplefilter("ignore")
            module = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):  # templates and deliberately broken samples
        return
    for node in ast.walk(module):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and text == text.encode(errors="ignore").decode():  # half surrogates are no text
                yield text


def _words(names: Iterable[object]) -> str:
    return ", ".join(map(str, names)) or "nothing"
