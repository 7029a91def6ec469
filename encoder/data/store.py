"""The token store: what `enc preprocess` writes and training reads.

    <store>/
        dataset_dict.json                       with what follows, what `datasets.load_from_disk` opens
        <split>/data-00000.arrow …              the ids: train, and perhaps eval and test
        <split>/state.json dataset_info.json
        tokenizer/ tokenizer_info.json          the tokenizer that made the ids
        manifest.json                           what was asked for, counts, and size and xxh3_64 of every file

One row is one document: the column `input_ids` is a list of uint16 (uint32 above 65,536 tokens) without special
tokens. Data files are Arrow IPC streams of at most about `SHARD_BYTES`; reading maps them into memory and copies
nothing.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from enc.encoder.data.manifest import data_fingerprint, listed, open_manifest, rebuild
from enc.encoder.errors import UsageError
from enc.encoder.files import file_checksum, write_json_safely

COLUMN = "input_ids"
SHARD_BYTES = 512 * 2**20  # a data file is closed once it is this large
_HELD_OUT_BY = {
    "eval": "dataset.eval_samples, dataset.validation_split or dataset.validation_file",
    "test": "dataset.test_samples or dataset.test_file",
}
END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"  # Arrow IPC: continuation marker, then an empty message


# --- bytes on disk ----------------------------------------------------------------------------------------------------


def token_dtype(num_tokens: int) -> np.dtype:
    """Return the smallest stored type for ids below `num_tokens`: uint16 up to 65,536, else uint32."""
    return np.dtype(np.uint16 if num_tokens <= 2**16 else np.uint32)


def arrow_schema(dtype: np.dtype) -> pa.Schema:
    """Return the schema of every data file: one column `input_ids`, a list of `dtype`."""
    return pa.schema([pa.field(COLUMN, pa.list_(pa.field("item", pa.from_numpy_dtype(dtype))))])


def record_batch_bytes(lengths: np.ndarray, ids: np.ndarray) -> pa.Buffer:
    """Return an Arrow IPC message with the documents of these lengths, int32 (N,), and ids, (sum of lengths,)."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=offsets[1:])
    schema = arrow_schema(ids.dtype)
    # from buffers, not pa.array: that one imports pandas, which takes longer than the tokens of a small corpus
    values = pa.Array.from_buffers(pa.from_numpy_dtype(ids.dtype), len(ids), [None, pa.py_buffer(ids)])
    column = pa.Array.from_buffers(schema.field(0).type, len(lengths), [None, pa.py_buffer(offsets)], children=[values])
    return pa.record_batch([column], schema=schema).serialize()


def data_file_name(split: str, shard: int) -> str:
    """Return the path of a data file inside the store."""
    return f"{split}/data-{shard:05d}.arrow"


def write_datasets_files(folder: Path, shards: dict[str, int], dtype: np.dtype) -> None:
    """Write the JSON files by which `datasets.load_from_disk` finds the data files: split -> number of shards."""
    item = {"dtype": dtype.name, "_type": "Value"}
    info = {"citation": "", "description": "", "features": {COLUMN: {"feature": item, "_type": "List"}}, "homepage": ""}
    for split, num_shards in shards.items():
        files = [{"filename": Path(data_file_name(split, shard)).name} for shard in range(num_shards)]
        state: dict[str, Any] = {
            "_data_files": files,
            "_fingerprint": xxhash.xxh3_64_hexdigest(f"{split} {num_shards}".encode()),
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": split,
        }
        write_json_safely(folder / split / "state.json", state)
        write_json_safely(folder / split / "dataset_info.json", {**info, "license": ""})
    write_json_safely(folder / "dataset_dict.json", {"splits": list(shards)})


# --- reading ----------------------------------------------------------------------------------------------------------


class Documents(Sequence[np.ndarray]):
    """The documents of one split, read from memory-mapped files.

    `documents[i]` is a read-only view of the ids, uint16 or uint32 (length,), and copies nothing. Safe to use after a
    fork; pickling sends the file names alone.
    """

    def __init__(self, files: Sequence[Path], dtype: np.dtype) -> None:
        self._files = tuple(files)
        self._dtype = dtype
        self._offsets: list[np.ndarray] = []  # a record batch: (documents + 1,) int32
        self._values: list[np.ndarray] = []  # a record batch: (tokens,)
        for file in self._files:
            for column in _read_columns(file):
                _, offsets, _, values = column.buffers()
                self._offsets.append(np.frombuffer(offsets, np.int32)[: len(column) + 1])
                self._values.append(np.frombuffer(values, self._dtype))
        counts = [len(offsets) - 1 for offsets in self._offsets]
        self._starts: list[int] = [0, *np.cumsum(counts, dtype=np.int64).tolist()]

    def __reduce__(self) -> tuple[Any, ...]:
        return Documents, (self._files, self._dtype)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> np.ndarray:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        batch = bisect_right(self._starts, index) - 1
        row = index - self._starts[batch]
        offsets = self._offsets[batch]
        return self._values[batch][offsets[row] : offsets[row + 1]]

    def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (lengths (N,), ids (sum of lengths,)) of consecutive documents."""
        for offsets, values in zip(self._offsets, self._values, strict=True):
            yield np.diff(offsets), values[offsets[0] : offsets[-1]]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens in each document, int32 (len(self),)."""
        parts = [np.diff(offsets) for offsets in self._offsets]
        lengths = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
        lengths.setflags(write=False)
        return lengths

    @property
    def dtype(self) -> np.dtype:
        """Type of the stored ids."""
        return self._dtype


def _read_columns(file: Path) -> Iterator[pa.ListArray]:
    try:
        with pa.memory_map(str(file)) as source:
            for batch in pa.ipc.open_stream(source):
                yield batch.column(0)
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{file} is not a readable data file: {error}. {rebuild(file.parents[1])}") from error


@dataclass(frozen=True)
class TokenStore:
    """An opened store. `open` checks the manifest and the presence and size of every file; `verify` reads them all."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> "TokenStore":
        """Open a store.

        Raises:
            UsageError: no store, another version, or a file that is missing or has another size.
        """
        return cls(Path(path), open_manifest(path))

    @property
    def tokenizer_dir(self) -> Path:
        """The folder that `EncoderTokenizer.load` and `AutoTokenizer.from_pretrained` read."""
        return self.path / "tokenizer"

    @property
    def fingerprint(self) -> str:
        """Equal for stores with the same tokens and the same tokenizer."""
        return data_fingerprint(self.manifest)

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits: "train" and perhaps "eval" and "test"."""
        return tuple(self.manifest["splits"])

    def split(self, name: str) -> Documents:
        """Return the documents of a split.

        Raises:
            UsageError: the store has no such split.
        """
        if name not in self.splits:
            raise UsageError(
                f"The token store {self.path} has no split {name!r}; it has {', '.join(self.splits)}. To hold "
                f"documents out, set "
                f"{_HELD_OUT_BY.get(name, 'dataset.eval_samples')} and preprocess into another folder."
            )
        files = sorted(file for file in self.manifest["files"] if file.startswith(f"{name}/data-"))
        return Documents([self.path / file for file in files], token_dtype(self.manifest["tokenizer"]["num_tokens"]))


def verify(path: str | Path | TokenStore) -> TokenStore:
    """Open a store, if that was not done yet, and read every file, comparing checksums.

    Raises:
        UsageError: as `TokenStore.open`, or names the files whose content has changed.
    """
    store = path if isinstance(path, TokenStore) else TokenStore.open(path)
    files = store.manifest["files"]
    with ThreadPoolExecutor() as threads:  # hashing and reading let go of the interpreter
        checksums = list(threads.map(file_checksum, [store.path / name for name in files]))
    damage = [
        f"{name} has checksum {found}, not {file['xxh3_64']}"
        for (name, file), found in zip(files.items(), checksums, strict=True)
        if found != file["xxh3_64"]
    ]
    if damage:
        raise UsageError(f"The token store {store.path} is damaged: {listed(damage)}. {rebuild(store.path)}")
    return store
