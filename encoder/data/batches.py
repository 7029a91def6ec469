"""Rows to flat, masked microbatches. What a step trains on is a function of (config, step), whoever asks.

The rows of an epoch stand in an order keyed by (seed, "order", epoch); step s takes the next `global_batch_size` of
them, over epoch ends if need be, and rank r of W takes the r-th slice of that. Masks are keyed by (seed, "mask", epoch,
row) in training, (seed, "eval", row) in evaluation and (seed, "test", row) in the test at the end.

Legend: N documents of a microbatch, M label places, X positions, T of them keys. Positions are the tokens of the text;
with a permutation (``enc.encoder.data.permutation``) there are more of them, and not all are keys.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from enc.encoder.data.interface import StepSizes
from enc.encoder.data.masking import MaskedRow, Masker
from enc.encoder.data.packing import PackingPlan
from enc.encoder.data.permutation import permuted_row
from enc.encoder.keyed import numpy_rng
from enc.encoder.sizing.batch_split import BatchSplit
from enc.kernels.masked_ce import IGNORE_INDEX

_LABEL_BLOCK = 64


class TwoStreams(NamedTuple):
    """Which positions see which keys, where documents are permuted: arguments of ``MpnetForMaskedLM``."""

    cu_seqlens_q: Tensor  # (N + 1,) int32: bounds of the documents among the positions
    key_indices: Tensor  # (T,) int64, ascending
    stages: Tensor  # (X,) int32
    key_stages: Tensor  # (T,) int32


@dataclass(frozen=True)
class Microbatch:
    """A flat batch: documents one after the other, without padding."""

    input_ids: Tensor  # (X,) int64
    cu_seqlens: Tensor  # (N + 1,) int32: the keys of document i are number cu_seqlens[i] to cu_seqlens[i + 1]
    position_ids: Tensor  # (X,) int64: position inside the document
    label_positions: Tensor  # (M,) int64, ascending: places after the last label are the last position
    label_ids: Tensor  # (M,) int64: IGNORE_INDEX after the last label
    max_seqlen: int  # positions of the longest document
    num_tokens: int  # of the text
    num_labels: int
    streams: TwoStreams | None = None

    @property
    def sizes(self) -> StepSizes:
        """What it holds; the sum of its losses is divided by labels."""
        keys = self.cu_seqlens.diff().long()
        positions = keys if self.streams is None else self.streams.cu_seqlens_q.diff()
        return StepSizes(
            size=self.num_labels,
            tokens=self.num_tokens,
            positions=self.input_ids.numel(),
            keys=int(self.cu_seqlens[-1]),
            pairs=int((keys * positions).sum()),
        )

    def to(self, device: torch.device) -> "Microbatch":
        """Return the batch on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Microbatch":
        return self._map(lambda tensor: tensor.pin_memory())

    def share_memory(self) -> None:
        """Move its tensors into memory that other processes can map."""
        self._map(Tensor.share_memory_)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Microbatch":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        mapped: dict[str, Any] = {name: function(value) for name, value in values.items() if isinstance(value, Tensor)}
        streams = self.streams and TwoStreams(*map(function, self.streams))
        return replace(self, streams=streams, **mapped)


@dataclass(frozen=True)
class Rows:
    """Random access to the packed rows of a split."""

    documents: Sequence[np.ndarray]  # token ids of document i, without special tokens
    plan: PackingPlan
    cls_id: int | None
    sep_id: int | None

    def __len__(self) -> int:
        return self.plan.num_rows

    @property
    def row_length(self) -> int:
        """Tokens that a row has room for."""
        return self.plan.row_length

    @property
    def fill(self) -> float:
        """Share of the rows' room that tokens take."""
        return self.plan.fill

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids (n,) int64 with special tokens, piece lengths) of one row."""
        plan = self.plan
        parts, lengths = [], []
        for piece in range(plan.row_starts[index], plan.row_starts[index + 1]):
            start, length = plan.offsets[piece], plan.lengths[piece]
            parts += [[self.cls_id]] if self.cls_id is not None else []
            parts.append(self.documents[plan.documents[piece]][start : start + length])
            parts += [[self.sep_id]] if self.sep_id is not None else []
            lengths.append(length + plan.special_per_piece)
        return np.concatenate(parts).astype(np.int64), np.array(lengths, np.int64)


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    """Return the order of the rows in an epoch, (num_rows,)."""
    return numpy_rng(seed, "order", epoch).permutation(num_rows)


class TrainBatches(Dataset[Microbatch]):
    """Microbatch i of a rank is microbatch ``i % accumulation`` of step ``i // accumulation`` (steps count from 0)."""

    def __init__(self, rows: Rows, masker: Masker, seed: int, split: BatchSplit, rank: int) -> None:
        self.rows, self.masker, self.seed, self.split, self.rank = rows, masker, seed, split, rank

    def __getitem__(self, index: int) -> Microbatch:
        return collate([self._masked_row(place) for place in self.places(index)])

    def places(self, index: int) -> range:
        """Return the places of a microbatch's rows in the endless sequence of rows."""
        step, micro = divmod(index, self.split.accumulation)
        per_rank = self.split.accumulation * self.split.rows_per_microbatch
        start = step * self.split.rows_per_step + self.rank * per_rank + micro * self.split.rows_per_microbatch
        return range(start, start + self.split.rows_per_microbatch)

    def row_at(self, place: int) -> tuple[int, int]:
        """Return (epoch, row) of a place."""
        epoch, index = divmod(place, len(self.rows))
        return epoch, int(epoch_order(self.seed, epoch, len(self.rows))[index])

    def _masked_row(self, place: int) -> MaskedRow:
        epoch, row = self.row_at(place)
        return mask_row(*self.rows.row(row), self.masker, numpy_rng(self.seed, "mask", epoch, row))


class EvalBatches(Dataset[Microbatch]):
    """Batches of held-out rows in order, with masks that are the same at every evaluation for this `purpose`."""

    def __init__(self, rows: Rows, masker: Masker, seed: int, rows_per_batch: int, purpose: str = "eval") -> None:
        self.rows, self.masker, self.seed, self.rows_per_batch = rows, masker, seed, rows_per_batch
        self.purpose = purpose

    def __len__(self) -> int:
        return -(-len(self.rows) // self.rows_per_batch)

    def __getitem__(self, index: int) -> Microbatch:
        indices = range(index * self.rows_per_batch, min((index + 1) * self.rows_per_batch, len(self.rows)))
        return collate([self._masked_row(index) for index in indices])

    def _masked_row(self, index: int) -> MaskedRow:
        return mask_row(*self.rows.row(index), self.masker, numpy_rng(self.seed, self.purpose, index))


def mask_row(ids: np.ndarray, lengths: np.ndarray, masker: Masker, rng: np.random.Generator) -> MaskedRow:
    """Mask a row of these ids (n,) in pieces of these lengths, and permute it where the objective asks."""
    if masker.objective != "mlm":
        return permuted_row(ids, lengths, masker, rng, placeholders=masker.objective == "mpnet")
    starts = np.cumsum(lengths) - lengths
    seen, label_positions, labels = masker.mask(ids, starts, rng)
    positions = np.arange(len(ids)) - np.repeat(starts, lengths)
    return MaskedRow(seen, lengths, positions, label_positions, labels, len(ids))


def collate(rows: list[MaskedRow]) -> Microbatch:
    """Join rows into one flat microbatch; label places are filled up to a multiple of 64 for steady shapes."""
    offsets = np.cumsum([0] + [len(row.ids) for row in rows])
    num_labels = sum(len(row.labels) for row in rows)
    places = -(-max(num_labels, 1) // _LABEL_BLOCK) * _LABEL_BLOCK
    positions, labels = np.full(places, offsets[-1] - 1), np.full(places, IGNORE_INDEX, np.int64)
    positions[:num_labels] = np.concatenate(
        [row.label_positions + start for row, start in zip(rows, offsets[:-1], strict=True)]
    )
    labels[:num_labels] = np.concatenate([row.labels for row in rows])
    streams = _join_streams(rows, offsets)
    bounds = _bounds([row.lengths for row in rows])
    return Microbatch(
        input_ids=torch.from_numpy(np.concatenate([row.ids for row in rows])),
        cu_seqlens=bounds,
        position_ids=torch.from_numpy(np.concatenate([row.positions for row in rows])),
        label_positions=torch.from_numpy(positions),
        label_ids=torch.from_numpy(labels),
        max_seqlen=int((bounds if streams is None else streams.cu_seqlens_q).diff().max()),
        num_tokens=sum(row.num_tokens for row in rows),
        num_labels=num_labels,
        streams=streams,
    )


def _join_streams(rows: list[MaskedRow], offsets: np.ndarray) -> TwoStreams | None:
    parts = [row.streams for row in rows if row.streams is not None]
    if not parts:
        return None
    lengths, key_indices, stages, key_stages = zip(*parts, strict=True)
    return TwoStreams(
        _bounds(lengths),
        torch.from_numpy(np.concatenate([keys + start for keys, start in zip(key_indices, offsets[:-1], strict=True)])),
        torch.from_numpy(np.concatenate(stages)),
        torch.from_numpy(np.concatenate(key_stages)),
    )


def _bounds(lengths: Iterable[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(np.concatenate(list(lengths)))]).astype(np.int32))
