"""What of a source is read and what is left out, and by what its content is known again."""

from pathlib import Path
from typing import Any

from enc.encoder.data.config import DatasetConfig
from enc.encoder.data.sources.source import Source, format_of
from enc.encoder.data.sources.splits import other_splits
from enc.encoder.files import file_checksum

Count = dict[str, Any]  # files, bytes, first (the name of one)


def source_summary(source: Source, dataset: DatasetConfig) -> dict[str, dict[str, Count]]:
    """Return what is read, by the endings of files, and what is left out, by reason; empty for what are no files."""
    if source.kind != "files":
        return {}
    others = other_splits(source, dataset.train_split, dataset.eval_split)
    unread = {file.name for file in others}
    read: dict[str, Count] = {}
    for file in source.files:
        if file.name not in unread:
            _count(read, "".join(format_of(file.name) or ()), file.name, file.size)
    left_out: dict[str, Count] = {}
    for unused in (*others, *source.left_out):
        _count(left_out, unused.reason, unused.name, unused.size)
    return {"read": read, "left_out": left_out}


def _count(counts: dict[str, Count], key: str, name: str, size: int) -> None:
    count = counts.setdefault(key, {"files": 0, "bytes": 0, "first": name})
    count["files"] += 1
    count["bytes"] += size


def content_digests(described: dict[str, Any]) -> dict[str, str]:
    """Return the checksum of each file of a described source that is still the file that was listed."""
    files = {Path(described["location"], name): (name, listed) for name, listed in described.get("files", {}).items()}
    return {name: file_checksum(path) for path, (name, listed) in files.items() if _listing(path) == listed}


def _listing(path: Path) -> list[int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns]
