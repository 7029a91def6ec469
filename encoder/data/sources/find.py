"""Which files or tables a source of text consists of."""

import hashlib
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from enc.encoder.data.config import DatasetConfig, TokenizerConfig
from enc.encoder.data.sources.source import (
    ENDINGS,
    HELD_OUT_FILES,
    PYTHON_DOCS,
    LeftOut,
    Source,
    SourceFile,
    format_of,
    listed,
)
from enc.encoder.data.sources.splits import split_files
from enc.encoder.errors import UsageError
from enc.encoder.files import read_json
from enc.encoder.printable import printable

_STORES = Path("tokenized_data")
_ABOUT_TEXT = re.compile(r"(readme|licen[cs]e|copying|notice|changelog)\b", re.IGNORECASE)
_ABOUT_JSON = re.compile(r"dataset_infos?\.json$", re.IGNORECASE)


def resolve_source(dataset: DatasetConfig) -> Source:
    """Return the source that a dataset section names; `path` wins over `name`.

    Raises:
        UsageError: the path does not exist or holds nothing that can be read.
    """
    if dataset.paths:
        sources = [_local_source(path, "dataset.path") for path in dataset.paths]
        return sources[0] if len(sources) == 1 else _joined(sources)
    name = dataset.name
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


def store_path(dataset: DatasetConfig) -> Path:
    """Return where the tokens of a dataset section are or will be, without reading any text.

    That is `path` itself if it is a token store, else `pre_tokenize_output`, else a folder of `tokenized_data/` named
    after `path`, or after `name` and the hub config.
    """
    if len(dataset.paths) == 1 and is_store(Path(dataset.paths[0]).expanduser()):
        return Path(dataset.paths[0]).expanduser()
    if dataset.pre_tokenize_output:
        return Path(dataset.pre_tokenize_output).expanduser()
    if not dataset.paths:
        return _STORES / _folder_name("-".join(filter(None, [dataset.name, dataset.config])))
    return _older_default(dataset) or _STORES / _folder_name("+".join(map(os.path.normpath, dataset.paths)))


def _folder_name(text: str) -> str:
    name = re.sub(r"[^\w.+-]+", "-", text).strip("-.") or "corpus"
    return name if len(name) <= 100 else f"{name[:80]}-{hashlib.blake2b(name.encode(), digest_size=8).hexdigest()}"


def _older_default(dataset: DatasetConfig) -> Path | None:
    """Return the store of a path that was named by the last part of the path alone, if it is there and of this text."""
    path = Path(dataset.paths[0]).expanduser()
    store = _STORES / _folder_name(path.name)
    try:
        made_of = Path(read_json(store / "manifest.json")["request"]["source"]["location"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return store if len(dataset.paths) == 1 and made_of in (path.absolute(), *path.absolute().parents) else None


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
    files = split_files(source, dataset.train_split, dataset.eval_split)
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
        or format_of(name) is not None
        or any(c in name for c in "*?[")
        or Path(name).exists()
    )


def _local_source(name: str, key: str) -> Source:
    path = Path(name).expanduser()
    try:
        return _found(path, key)
    except OSError as error:  # of looking at a name, a folder or a link in it
        place = printable(error.filename or path)
        raise UsageError(
            f"{key}: cannot read {place}: {error.strerror or error}{_link_target(place)}. Mend it, or take it out of "
            "the source."
        ) from error


def _link_target(place: str) -> str:
    return f" (it is a link to {printable(os.readlink(place))})" if os.path.islink(place) else ""


def _found(path: Path, key: str) -> Source:
    if path.is_dir():
        return _folder_source(path, key)
    if path.is_file():
        if not format_of(path.name):
            raise UsageError(f"{key}: cannot read {path}: its name ends in none of {ENDINGS}.")
        return Source("files", str(path.parent.absolute()), _stat_files(path.parent, [path]))
    if any(c in str(path) for c in "*?["):
        return _glob_source(path, key)
    raise UsageError(
        f"{key}: {path} does not exist (looked in {Path.cwd()}). Give an existing file, folder or glob, or the "
        "place of a token store, or leave dataset.path empty and put the name of a hub dataset in dataset.name."
    )


def _joined(sources: list[Source]) -> Source:
    """Return several sources of files as one, below the folder that they share; a file in two of them is read once."""
    if other := next((source for source in sources if source.kind != "files"), None):
        raise UsageError(
            f"dataset.path: {other.location} is not a source of files but of the kind {other.kind!r}, which cannot be "
            "one of several. Name it alone, or export it to Parquet."
        )
    root = os.path.commonpath([source.location for source in sources])
    files = {_below(root, source, file.name): file for source in sources for file in source.files}
    left_out = {_below(root, source, file.name): file for source in sources for file in source.left_out}
    return Source(
        "files",
        root,
        tuple(replace(files[name], name=name) for name in sorted(files)),
        tuple(left_out[name]._replace(name=name) for name in sorted(left_out.keys() - files.keys())),
    )


def _below(root: str, source: Source, name: str) -> str:
    return Path(source.location, name).relative_to(root).as_posix()


def _glob_source(pattern: Path, key: str) -> Source:
    parts = pattern.parts
    first = next(i for i, part in enumerate(parts) if any(c in part for c in "*?["))
    root = Path(*parts[:first])
    matches = sorted(root.glob(str(Path(*parts[first:]))))
    found = [path for path in matches if not path.is_dir() and "/." not in f"/{path.relative_to(root).as_posix()}"]
    source = _files_source(root, found)
    if not source.files:
        what = f"matches {len(found)} files, none" if found else "matches no file"
        raise UsageError(f"{key}: {pattern} {what} that ends in one of {ENDINGS}.")
    return source


def _folder_source(folder: Path, key: str) -> Source:
    if is_store(folder):
        return Source("store", str(folder.absolute()))
    found = list(_walk(folder))
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return Source("arrow", str(folder.absolute()), _stat_files(folder, found))
    source = _files_source(folder, found)
    if not source.files:
        others = sorted({"".join(path.suffixes[-2:]) or path.name for path in found})[:8]
        raise UsageError(
            f"{key}: the folder {folder} holds no text: it has {len(found)} files"
            + (f" ({listed(map(printable, others))})" if others else "")
            + f", and none ends in one of {ENDINGS}."
        )
    return source


def _files_source(root: Path, found: list[Path]) -> Source:
    """Choose from the files of a folder or a glob, and say of the others why not."""
    formats = [
        file_format for path in found if not _ABOUT_JSON.match(path.name) and (file_format := format_of(path.name))
    ]
    beside_tables = any(file_format.has_columns for file_format in formats)
    reasons = {path: reason for path in found if (reason := _why_not(path, beside_tables))}
    left_out = (LeftOut(file.name, file.size, reasons[root / file.name]) for file in _stat_files(root, reasons))
    used = _stat_files(root, [path for path in found if path not in reasons])
    return Source("files", str(root.absolute()), used, tuple(left_out))


def _why_not(path: Path, beside_tables: bool) -> str | None:
    file_format = format_of(path.name)
    if not file_format:
        return "of an ending that is not read"
    if _ABOUT_JSON.match(path.name) or (beside_tables and not file_format.has_columns and _ABOUT_TEXT.match(path.name)):
        return "about the dataset"
    return None


def is_store(folder: Path) -> bool:
    """Return whether a folder looks like a token store; opening it tells whether it is a good one."""
    return (folder / "manifest.json").is_file() and (folder / "tokenizer").is_dir()


def _walk(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder in sorted order, through links, without hidden ones."""
    seen: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=True, onerror=_stop):
        real = os.path.realpath(root)
        if real in seen:  # a link that leads back up would never end
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(root, name) for name in sorted(files) if not name.startswith("."))


def _stop(error: OSError) -> None:
    raise error  # `os.walk` would pass over a folder that it may not read


def _stat_files(root: Path, paths: Iterable[Path]) -> tuple[SourceFile, ...]:
    files = [(_utf8_name(path.relative_to(root).as_posix(), root), path.stat()) for path in paths]
    return tuple(SourceFile(name, stat.st_size, stat.st_mtime_ns) for name, stat in sorted(files))


def _utf8_name(name: str, root: Path) -> str:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"The name of {printable(root / name)} is not UTF-8. Rename the file, or take it out of the source."
        ) from error
    return name


def local_folder(config: TokenizerConfig) -> Path | None:
    """Return the folder that a tokenizer section names, or None for a name of the hub.

    Raises:
        UsageError: `tokenizer.path` is set and is no folder.
    """
    if config.path:
        folder = Path(config.path).expanduser()
        if not folder.is_dir():
            raise UsageError(f"tokenizer.path: {folder} is not a folder. Give the folder that holds tokenizer.json.")
        return folder
    folder = Path(config.name).expanduser()
    return folder if folder.is_dir() else None
