"""Which files or tables a source of text consists of."""

import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from enc.encoder.data.config import DatasetConfig
from enc.encoder.data.sources.source import FILE_SUFFIXES, HELD_OUT_FILES, PYTHON_DOCS, Source, SourceFile, listed
from enc.encoder.data.sources.splits import split_files
from enc.encoder.errors import UsageError


def resolve_source(dataset: DatasetConfig) -> Source:
    """Return the source that a dataset section names; `path` wins over `name`.

    Raises:
        UsageError: the path does not exist or holds nothing that can be read.
    """
    if dataset.path:
        return _local_source(dataset.path, "dataset.path")
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

    That is `path` itself if it is a token store, else `pre_tokenize_output`, else `tokenized_data/<name>` (with the
    hub config's name).
    """
    if dataset.path and is_store(Path(dataset.path).expanduser()):
        return Path(dataset.path).expanduser()
    if dataset.pre_tokenize_output:
        return Path(dataset.pre_tokenize_output).expanduser()
    name = Path(dataset.path).name if dataset.path else "-".join(filter(None, [dataset.name, dataset.config]))
    return Path("tokenized_data") / (re.sub(r"[^\w.+-]+", "-", name).strip("-.") or "corpus")


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
            raise UsageError(f"{key}: cannot read {path}: its name ends in none of {listed(FILE_SUFFIXES)}.")
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
        raise UsageError(f"{key}: {pattern} {what} that ends in one of {listed(FILE_SUFFIXES)}.")
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
            + (f" ({listed(others)})" if others else "")
            + f", and none ends in one of {listed(FILE_SUFFIXES)}."
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
