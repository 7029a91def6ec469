"""A source of text: what kinds there are, and the files or table that it consists of."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

PYTHON_DOCS = "python-docs"
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".text")
JSON_SUFFIXES = (".jsonl", ".json")
PARQUET_SUFFIXES = (".parquet",)
FILE_SUFFIXES = tuple(s + z for s in TEXT_SUFFIXES + JSON_SUFFIXES for z in ("", ".gz")) + PARQUET_SUFFIXES
TEXT_COLUMNS = ("text", "sentence", "content")
SPLITS = ("train", "eval", "test")
HELD_OUT_FILES = {"eval": "validation_file", "test": "test_file"}  # split -> key of its own source


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


def listed(names: Iterable[object]) -> str:
    return ", ".join(map(str, names)) or "nothing"
