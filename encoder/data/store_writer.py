"""Writing a token store chunk by chunk, so that a killed one goes on where it was."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import xxhash

from enc.encoder.data import store
from enc.encoder.data.chunks import Chunk
from enc.encoder.data.manifest import FORMAT, VERSION
from enc.encoder.data.sources.source import SPLITS
from enc.encoder.data.tokenizer import EncoderTokenizer
from enc.encoder.errors import UsageError
from enc.encoder.files import file_checksum, replace_atomically, write_json_safely


@dataclass(frozen=True)
class Written:
    """A line of the progress log: one chunk that is in a data file, from byte `start` to byte `end`."""

    split: str
    shard: int
    start: int
    end: int
    documents: int
    tokens: int
    text: str  # digest of the chunk's text
    data: str  # digest of the bytes in the data file
    characters: int = 0
    unknown_tokens: int = 0
    unknown_documents: int = 0  # of which no token is known


STATISTICS = ("characters", "unknown_tokens", "unknown_documents")


def count_unknown(lengths: np.ndarray, ids: np.ndarray, unknown_id: int | None) -> tuple[int, int]:
    """Return how many tokens of documents of these lengths are unknown, and how many documents are nothing else."""
    if unknown_id is None or not len(ids):
        return 0, 0
    unknown = ids == unknown_id
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    in_documents = np.add.reduceat(unknown, starts, dtype=np.int64)
    return int(unknown.sum()), int((in_documents == lengths).sum())


class StoreWriter:
    """Appends chunks to the data files of an unfinished store, and takes up one that was left at any moment."""

    REQUEST = "request.json"
    LOG = "progress.jsonl"

    def __init__(self, folder: Path, dtype: np.dtype, unknown_id: int | None = None) -> None:
        self._folder = folder
        self._dtype = dtype
        self._unknown_id = unknown_id
        self._header = bytes(store.arrow_schema(dtype).serialize())
        self.tokens = 0
        self._shards: dict[str, int] = {}
        self._files: dict[str, BinaryIO] = {}
        self._digests: dict[str, Any] = {}  # data file -> running xxh3_64 of all its bytes
        self._sizes: dict[str, int] = {}
        self._totals: dict[str, dict[str, int]] = {}
        self._statistics: dict[str, dict[str, int]] = {}
        self.done = self._recover()
        self._log = (folder / self.LOG).open("ab", buffering=0)

    def _recover(self) -> list[Written]:
        """Keep the longest beginning of the log whose bytes are really in the data files; cut off what comes after."""
        done: list[Written] = []
        for line in _read_log(self._folder / self.LOG):
            data = self._read_back(line)
            if data is None or xxhash.xxh3_64_hexdigest(data) != line.data:
                break
            self._account(line, data)
            done.append(line)
        for path in self._folder.glob("*/data-*.arrow"):
            name = path.relative_to(self._folder).as_posix()
            os.truncate(path, self._sizes[name]) if name in self._sizes else path.unlink()
        log = "".join(json.dumps(asdict(line)) + "\n" for line in done)
        replace_atomically(self._folder / self.LOG, log)
        return done

    def _read_back(self, line: Written) -> bytes | None:
        name = store.data_file_name(line.split, line.shard)
        if line.start != self._sizes.get(name, len(self._header)):
            return None
        try:
            with (self._folder / name).open("rb") as file:
                if line.start == len(self._header) and file.read(line.start) != self._header:
                    return None
                file.seek(line.start)
                return file.read(line.end - line.start)
        except OSError:
            return None

    def append(self, chunk: Chunk, lengths: np.ndarray, ids: np.ndarray) -> None:
        """Write one chunk's documents, lengths int32 (N,) and ids (sum of lengths,), and then its line of the log."""
        data = memoryview(store.record_batch_bytes(lengths, ids))
        shard = self._shards.get(chunk.split, 0)
        if self._sizes.get(store.data_file_name(chunk.split, shard), 0) >= store.SHARD_BYTES:
            self._close(chunk.split)
            shard += 1
        name = store.data_file_name(chunk.split, shard)
        file = self._open(chunk.split, name)
        start = self._sizes.get(name, len(self._header))
        _write_all(file, data)
        line = Written(
            chunk.split,
            shard,
            start,
            start + len(data),
            len(lengths),
            len(ids),
            chunk.digest(),
            xxhash.xxh3_64_hexdigest(data),
            chunk.num_characters,
            *count_unknown(lengths, ids, self._unknown_id),
        )
        _write_all(self._log, memoryview(json.dumps(asdict(line)).encode() + b"\n"))
        self._account(line, data)

    def _account(self, line: Written, data: bytes | memoryview) -> None:
        name = store.data_file_name(line.split, line.shard)
        if name not in self._digests:
            self._digests[name] = xxhash.xxh3_64(self._header)
        self._digests[name].update(data)
        self._sizes[name] = line.end
        self._shards[line.split] = line.shard
        totals = self._totals.setdefault(line.split, {"documents": 0, "tokens": 0})
        totals["documents"] += line.documents
        totals["tokens"] += line.tokens
        self.tokens += line.tokens
        statistics = self._statistics.setdefault(line.split, dict.fromkeys(STATISTICS, 0))
        for name in STATISTICS:
            statistics[name] += getattr(line, name)

    def _open(self, split: str, name: str) -> BinaryIO:
        if split not in self._files:
            path = self._folder / name
            path.parent.mkdir(exist_ok=True)
            file = path.open("ab", buffering=0)
            if file.tell() == 0:
                _write_all(file, memoryview(self._header))
            self._files[split] = cast(BinaryIO, file)
        return self._files[split]

    def _close(self, split: str) -> None:
        if split in self._files:
            os.fsync(self._files[split].fileno())
            self._files.pop(split).close()

    def _end(self, name: str) -> None:
        with (self._folder / name).open("ab") as file:
            file.write(store.END_OF_STREAM)
            file.flush()
            os.fsync(file.fileno())
        self._digests[name].update(store.END_OF_STREAM)
        self._sizes[name] += len(store.END_OF_STREAM)

    def close(self) -> None:
        """Let go of the files; what was appended stays."""
        for split in list(self._files):
            self._close(split)
        self._log.close()

    def finish(self, request: dict[str, Any], tokenizer: EncoderTokenizer, about_text: dict[str, Any]) -> None:
        """Close the data files and write everything that makes the folder a store, the manifest last.

        `about_text` is what the manifest shall say of the text beside what was asked for.

        Raises:
            UsageError: the tokenizer made nothing of all the text.
        """
        if not self._totals.get("train", {}).get("tokens"):
            raise UsageError(
                f"The tokenizer {tokenizer.name} makes no tokens of the text of {request['source']['location']}. "
                f"Check the source "
                "and the tokenizer."
            )
        self.close()
        for name in self._digests:
            self._end(name)
        splits = [split for split in SPLITS if split in self._shards]
        store.write_datasets_files(self._folder, {split: self._shards[split] + 1 for split in splits}, self._dtype)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "request": request,
            "tokenizer": {
                "name": tokenizer.name,
                "fingerprint": tokenizer.fingerprint(),
                "num_tokens": tokenizer.num_tokens,
            },
            "splits": {split: self._totals[split] for split in splits},
            "statistics": {split: self._statistics[split] for split in splits},
            **about_text,
            "files": {name: self._entry(name) for name in self._final_files()},
        }
        write_json_safely(self._folder / "manifest.json", manifest)

    def _final_files(self) -> list[str]:
        names = (path.relative_to(self._folder).as_posix() for path in self._folder.rglob("*") if path.is_file())
        return sorted(
            name for name in names if name not in (self.REQUEST, self.LOG, "manifest.json") and "/." not in f"/{name}"
        )

    def _entry(self, name: str) -> dict[str, Any]:
        path = self._folder / name
        digest = self._digests[name].hexdigest() if name in self._digests else file_checksum(path)
        return {"bytes": self._sizes.get(name, path.stat().st_size), "xxh3_64": digest}


def _read_log(path: Path) -> Iterator[Written]:
    """Yield the lines of a progress log up to the first that is not whole."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return
    for line in lines:
        try:
            yield Written(**json.loads(line))
        except (ValueError, TypeError):
            return


def _write_all(file: Any, data: memoryview) -> None:
    """Write everything: an unbuffered file may take less than it is given, at 2 GB or on a nearly full disk."""
    while data:
        data = data[file.write(data) :]
