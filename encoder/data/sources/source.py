"""A source of text: what kinds there are, and the files or table that it consists of."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # whoever only looks at sources needs none
    import numpy as np

PYTHON_DOCS = "python-docs"
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".text")
JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
PARQUET = ".parquet"
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_PACKABLE = (*TEXT_SUFFIXES, *JSON_SUFFIXES, *DELIMITERS)
ENDINGS = f"{', '.join(_PACKABLE)} (also with {' '.join(COMPRESSIONS)}), {PARQUET}"
IDS_COLUMN = "input_ids"
TEXT_COLUMNS = ("text", "sentence", "content")
SPLITS = ("train", "eval", "test")
HELD_OUT_FILES = {"eval": "validation_file", "test": "test_file"}  # split -> key of its own source


class Format(NamedTuple):
    """How a file is read: by the ending of its format, and that of its compression or ""."""

    suffix: str
    compression: str

    @property
    def has_columns(self) -> bool:
        """Whether a row has columns, one of which holds the text."""
        return self.suffix not in TEXT_SUFFIXES


def format_of(name: str) -> Format | None:
    """Return how a file of this name is read, in whatever case it is written; None if it is not."""
    stem = name.lower()
    compression = next((ending for ending in COMPRESSIONS if stem.endswith(ending)), "")
    suffixes = _PACKABLE if compression else (*_PACKABLE, PARQUET)
    suffix = next((suffix for suffix in suffixes if stem.removesuffix(compression).endswith(suffix)), None)
    return Format(suffix, compression) if suffix else None


class Text(NamedTuple):
    """A text as its source gives it, and how far into the source it ends (`Source.unit`)."""

    text: str
    position: int


class Tokens(NamedTuple):
    """A document that its source gives as ids of tokens, (length,) int64, and how far into the source it ends."""

    ids: "np.ndarray"
    position: int


class BadRow(NamedTuple):
    """A row that holds no text that can be read, why, and how far into the source it ends."""

    reason: str
    position: int


Row = Text | Tokens | BadRow


class Document(NamedTuple):
    """A usable document: its split (one of SPLITS), its text or ids, and how far into the sources it ends."""

    split: str
    text: "str | np.ndarray"
    position: int


@dataclass(frozen=True)
class SourceFile:
    """A file of a source: path relative to the source's root, size in bytes, modification time in ns."""

    name: str
    size: int
    mtime_ns: int


class LeftOut(NamedTuple):
    """A file among those of a source that is not read, and why."""

    name: str
    size: int
    reason: str


@dataclass(frozen=True)
class Source:
    """What `dataset.name` or `dataset.path` stands for, found by listing folders and without opening a text.

    `kind` is "files", "arrow" (a `save_to_disk` folder), "hub", "python-docs" or "store" (an already built token
    store). `location` is the root folder, the hub name, or the Python version.
    """

    kind: str
    location: str
    files: tuple[SourceFile, ...] = ()
    left_out: tuple[LeftOut, ...] = ()

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
