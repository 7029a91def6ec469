"""Which piece of which document stands in which row: histogram packing.

A document longer than a row is cut into pieces; no token is dropped. Pieces are then placed by best fit, longest
first, on the HISTOGRAM of their lengths, so that the search costs what the row length asks for, whatever the size of
the corpus (Krell et al. 2021, arXiv 2107.02027). The plan depends on (lengths, row length, seed) alone.

Legend: N documents, P pieces, R rows, L tokens a row.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from enc.encoder.keyed import numpy_rng

Group = tuple[int, tuple[int, ...]]  # (number of rows, the lengths that each of them holds)


@dataclass(frozen=True)
class PackingPlan:
    """Rows as lists of document pieces; row i holds pieces ``row_starts[i]:row_starts[i + 1]``."""

    row_starts: np.ndarray  # (R + 1,) int64
    documents: np.ndarray  # (P,) int64: document of each piece
    offsets: np.ndarray  # (P,) int64: first token of the piece in its document
    lengths: np.ndarray  # (P,) int32: tokens of the piece, special tokens not counted
    row_length: int
    special_per_piece: int

    @property
    def num_rows(self) -> int:
        return len(self.row_starts) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens in all rows, special tokens included."""
        return int(self.lengths.sum()) + self.special_per_piece * len(self.lengths)

    @property
    def fill(self) -> float:
        """Share of the rows' places that hold a token."""
        return self.num_tokens / (self.num_rows * self.row_length)


def plan_rows(
    document_lengths: np.ndarray, row_length: int, special_per_piece: int, seed: int, pack: bool = True
) -> PackingPlan:
    """Place every token of every document into rows of `row_length` tokens.

    `document_lengths` (N,) counts tokens without special ones; each piece adds `special_per_piece` of them. With
    ``pack=False`` each piece is a row of its own.
    """
    documents, offsets, lengths = cut_documents(document_lengths, row_length - special_per_piece)
    if pack:
        row_starts, order = _pack(lengths + special_per_piece, row_length, seed)
    else:
        row_starts, order = np.arange(len(lengths) + 1), np.arange(len(lengths))
    return PackingPlan(row_starts, documents[order], offsets[order], lengths[order], row_length, special_per_piece)


def cut_documents(document_lengths: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut documents into pieces of at most `room` tokens: (document, offset, length) of each piece, in order."""
    pieces_per_document = -(-document_lengths.astype(np.int64) // room)
    documents = np.repeat(np.arange(len(document_lengths)), pieces_per_document)
    first_piece = np.repeat(np.cumsum(pieces_per_document) - pieces_per_document, pieces_per_document)
    offsets = (np.arange(len(documents)) - first_piece) * room
    lengths = np.minimum(document_lengths[documents] - offsets, room).astype(np.int32)
    return documents, offsets, lengths


def pack_histogram(counts: np.ndarray, row_length: int) -> list[Group]:
    """Pack `counts[n]` pieces of n tokens into rows of `row_length`, longest first, each into the tightest place."""
    open_groups: dict[int, list[Group]] = {room: [] for room in range(row_length + 1)}
    rooms = 0  # bit r is set while some group has r places left
    for length in range(row_length, 0, -1):
        remaining = int(counts[length])
        while remaining:
            fitting = rooms >> length
            if not fitting:  # open new rows, with as many pieces of this length as they hold
                per_row = row_length // length
                repeat, per_row = (remaining // per_row, per_row) if remaining >= per_row else (1, remaining)
                group, room = (repeat, (length,) * per_row), row_length - length * per_row
                remaining -= repeat * per_row
            else:
                source_room = length + (fitting & -fitting).bit_length() - 1
                available, content = open_groups[source_room].pop()
                repeat = min(available, remaining)
                if repeat < available:
                    open_groups[source_room].append((available - repeat, content))
                if not open_groups[source_room]:
                    rooms &= ~(1 << source_room)
                group, room = (repeat, (*content, length)), source_room - length
                remaining -= repeat
            open_groups[room].append(group)
            rooms |= 1 << room
    return [group for groups in open_groups.values() for group in groups]


def _pack(lengths: np.ndarray, row_length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (row_starts, order of the pieces); pieces of one length are drawn in a seeded order."""
    shuffled = numpy_rng(seed, "packing").permutation(len(lengths))
    by_length = shuffled[np.argsort(lengths[shuffled], kind="stable")]
    counts = np.bincount(lengths, minlength=row_length + 1)
    next_piece = np.cumsum(counts) - counts
    blocks, row_sizes = [], []
    for repeat, content in pack_histogram(counts, row_length):
        columns = []
        for length, times in Counter(content).items():
            start = next_piece[length]
            next_piece[length] += repeat * times
            columns.append(by_length[start : next_piece[length]].reshape(repeat, times))
        blocks.append(np.concatenate(columns, axis=1).ravel())
        row_sizes.append(np.full(repeat, len(content)))
    order = np.concatenate(blocks) if blocks else np.empty(0, np.int64)
    sizes = np.concatenate(row_sizes) if row_sizes else np.empty(0, np.int64)
    return np.concatenate([[0], np.cumsum(sizes)]), order
