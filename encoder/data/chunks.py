"""Runs of documents that a worker tokenises at a time."""

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import xxhash

from enc.encoder.data.sources.source import SPLITS, Document

CHUNK_BYTES = 4 * 2**20  # UTF-8 bytes of text that go to a worker at once and become one record batch
FIRST_CHUNK_BYTES = 2**18  # chunks grow to the full size, so that small corpora are shared out evenly too
LENGTH = struct.Struct("<Q")


@dataclass
class Chunk:
    """Consecutive documents of one split, and the position in the source after the last of them.

    Documents are UTF-8, or int64 ids where `holds_ids`.
    """

    split: str
    texts: list[bytes] = field(default_factory=list)
    num_bytes: int = 0
    num_characters: int = 0
    position: int = 0
    holds_ids: bool = False

    def add(self, text: str | np.ndarray) -> None:
        """Add a document: text, or ids."""
        if isinstance(text, str):
            self.num_characters += len(text)
            encoded = text.encode()
        else:
            self.holds_ids = True
            encoded = text.astype(np.int64).tobytes()
        self.texts.append(encoded)
        self.num_bytes += len(encoded)

    def documents(self) -> list[np.ndarray]:
        """Return the ids of each document of a chunk that holds ids."""
        return [np.frombuffer(ids, np.int64) for ids in self.texts]

    def digest(self) -> str:
        """Return the xxh3_64 of the texts, by which a resumed run knows that the source is still the same."""
        digest = xxhash.xxh3_64()
        for text in self.texts:
            digest.update(LENGTH.pack(len(text)))
            digest.update(text)
        return digest.hexdigest()


def cut_chunks(documents: Iterable[Document], first_bytes: int, full_bytes: int) -> Iterator[Chunk]:
    """Gather documents into chunks of one split each, by their size alone; what is left over comes last."""
    size = first_bytes
    open_chunks: dict[str, Chunk] = {}
    for split, text, position in documents:
        chunk = open_chunks.setdefault(split, Chunk(split))
        chunk.add(text)
        chunk.position = position
        if chunk.num_bytes >= size:
            yield open_chunks.pop(split)
            size = min(size + first_bytes // 2, full_bytes)
    yield from (open_chunks[split] for split in SPLITS if split in open_chunks)
