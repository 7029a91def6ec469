"""Which files of a source belong to which split."""

import re

from enc.encoder.data.sources.source import Source, SourceFile
from enc.encoder.errors import UsageError


def refuse_splits(source: Source, split: str | None) -> None:
    if split:
        raise UsageError(
            f"{source.location} has no splits, but the config asks for {split!r}. Set dataset.train_split and "
            "dataset.eval_split to null and hold documents out with validation_split or eval_samples."
        )


def split_files(source: Source, split: str | None, held_out: str | None) -> tuple[SourceFile, ...]:
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
                f"as a word (like {name}/a.txt or {name}-0.jsonl). Rename the files, or set dataset.train_split and "
                "dataset.eval_split to null and use dataset.validation_split or dataset.eval_samples."
            )
    if split is None:
        return tuple(file for file in source.files if file not in named[str(held_out)])
    return tuple(named[split])


def _names_split(name: str, split: str) -> bool:
    return re.search(rf"(^|[/._-]){re.escape(split)}([/._-]|$)", name) is not None
