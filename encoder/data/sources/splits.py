"""Which files of a source belong to which split."""

import re

from enc.encoder.data.sources.source import COMPRESSIONS, LeftOut, Source, SourceFile, format_of
from enc.encoder.errors import UsageError

ALL_FILES = "all"  # the `train_split` that takes no notice of names
_HELD_OUT = ("validation", "valid", "val", "dev", "eval", "test")


def refuse_splits(source: Source, split: str | None) -> None:
    if split:
        raise UsageError(
            f"{source.location} has no splits, but the config asks for {split!r}. Set dataset.train_split and "
            "dataset.eval_split to null and hold documents out with validation_split or eval_samples."
        )


def train_split(source: Source, asked: str | None, held_out: str | None) -> str | None:
    """Return the split to train on: the asked one, else `train` where the files are named by splits.

    Raises:
        UsageError: some files are named as held-out text, and which of the others to train on cannot be told.
    """
    if asked or source.kind != "files":
        return asked
    train = [file for file in source.files if _is_split(file.name, "train")]
    held = [file for file in source.files if any(_is_split(file.name, word) for word in _HELD_OUT)]
    others = [file for file in source.files if file not in train and file not in held]
    if not (train or others) or all(held_out and _names_split(file.name, held_out) for file in held):
        return None
    if not others:
        return "train"
    named = f"train ({_counted(train)}) and " if train else ""
    train_alone = "dataset.train_split=train for that split alone, " if train else ""
    raise UsageError(
        f"{source.location} has files whose names say {named}held-out text ({_counted(held)}), and others "
        f"({_counted(others)}). Say what to train on: {train_alone}dataset.train_split={ALL_FILES} for all of them, "
        "dataset.eval_split for the split to evaluate on and leave out, or a glob in dataset.path."
    )


def _counted(files: list[SourceFile]) -> str:
    return files[0].name + (f" and {len(files) - 1} more" if len(files) > 1 else "")


def split_files(source: Source, asked: str | None, held_out: str | None) -> tuple[SourceFile, ...]:
    """Choose files by the split that a folder or file name has as a word: `validation/a.txt`, `train-00001.jsonl`."""
    evaluated = set(_files_of(source, held_out)) if held_out else set()
    split = train_split(source, asked, held_out)
    if split not in (None, ALL_FILES):
        return _files_of(source, str(split))
    return tuple(file for file in source.files if file not in evaluated)


def other_splits(source: Source, asked: str | None, held_out: str | None) -> list[LeftOut]:
    """Return the files of a source that belong to a split which is neither trained nor evaluated on."""
    used = {*split_files(source, asked, held_out), *(_files_of(source, held_out) if held_out else ())}
    return [LeftOut(file.name, file.size, "of another split") for file in source.files if file not in used]


def _files_of(source: Source, split: str) -> tuple[SourceFile, ...]:
    files = tuple(file for file in source.files if _names_split(file.name, split))
    if not files:
        raise UsageError(
            f"No file of {source.location} belongs to the split {split!r}: neither a folder nor a file name has it "
            f"as a word (like {split}/a.txt or {split}-0.jsonl). Rename the files, or set dataset.train_split and "
            "dataset.eval_split to null and use dataset.validation_split or dataset.eval_samples."
        )
    return files


def _names_split(name: str, split: str) -> bool:
    return re.search(rf"(^|[/._-]){re.escape(split)}([/._-]|$)", name) is not None


def _is_split(name: str, split: str) -> bool:
    """Tell whether a file is named as a whole split or a part of one: test/a.txt, c4-test.00001-of-8.json, test.csv.

    Names that only have the word in them, like `test-results.txt` or `dev-tools/`, are not.
    """
    *folders, file = name.lower().split("/")
    stem = file
    for ending in COMPRESSIONS:
        stem = stem.removesuffix(ending)
    file_format = format_of(file)
    stem = stem.removesuffix(file_format.suffix) if file_format else stem
    return split in folders or re.search(rf"(^|[._-]){split}([._-]?\d[\w.-]*)?$", stem) is not None
