"""Batches: what a step trains on is a function of (config, step), whatever the number of ranks."""

import itertools

import numpy as np
import pytest
import torch

from enc.encoder.data.batches import EvalBatches, Rows, TrainBatches
from enc.encoder.data.masking import Masker
from enc.encoder.data.packing import plan_rows
from enc.encoder.errors import UsageError
from enc.encoder.run.config import TrainerConfig
from enc.encoder.sizing.batch_split import BatchSplit, split_batch
from enc.kernels.masked_ce import IGNORE_INDEX

VOCABULARY = 50
SPECIAL = np.arange(VOCABULARY) < 5


@pytest.fixture(scope="module")
def documents() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(5, VOCABULARY, n).astype(np.uint16) for n in rng.integers(1, 90, 150)]


@pytest.fixture(scope="module")
def rows(documents: list[np.ndarray]) -> Rows:
    lengths = np.array([len(d) for d in documents], np.int32)
    return Rows(documents, plan_rows(lengths, 32, 2, seed=3), cls_id=2, sep_id=3)


@pytest.fixture(scope="module")
def masker() -> Masker:
    return Masker(4, SPECIAL, np.flatnonzero(~SPECIAL), np.zeros(VOCABULARY, bool), 0.2)


def row_numbers(batches: TrainBatches, index: int) -> list[int]:
    """Return which rows a microbatch holds."""
    return [batches.row_at(place)[1] for place in batches.places(index)]


def step_rows(rows: Rows, masker: Masker, split: BatchSplit, step: int) -> list[tuple]:
    """Return (row, what the model sees, labels) of every row of a step, in the order of the ranks."""
    found = []
    for rank in range(split.world_size):
        batches = TrainBatches(rows, masker, 1, split, rank)
        for micro in range(split.accumulation):
            batch = batches[step * split.accumulation + micro]
            numbers = row_numbers(batches, step * split.accumulation + micro)
            ends = np.cumsum([len(rows.row(row)[0]) for row in numbers])
            real = batch.label_ids != IGNORE_INDEX
            for row, start, end in zip(numbers, [0, *ends[:-1]], ends, strict=True):
                inside = real & (batch.label_positions >= start) & (batch.label_positions < end)
                labels = (batch.label_positions[inside] - start, batch.label_ids[inside])
                found.append((row, batch.input_ids[start:end].tolist(), [part.tolist() for part in labels]))
    return found


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("rows_per_microbatch", [1, 2])
def test_a_step_is_the_same_on_any_number_of_ranks(rows, masker, world_size: int, rows_per_microbatch: int) -> None:
    """16 rows a step: the same rows with the same masks in the same order, over an epoch's end too."""
    accumulation = 16 // (world_size * rows_per_microbatch)
    split = BatchSplit(world_size, accumulation, rows_per_microbatch)
    for step in (0, 1, len(rows) // 16, 40):
        assert step_rows(rows, masker, split, step) == step_rows(rows, masker, BatchSplit(1, 1, 16), step)


def test_an_epoch_holds_every_token_once(rows: Rows, documents, masker: Masker) -> None:
    """The labels put back, the rows of one epoch are the documents, each token once."""
    batches = TrainBatches(rows, masker, 1, BatchSplit(1, 1, 1), 0)
    found: dict[int, int] = {}
    for index in range(len(rows)):
        batch = batches[index]
        ids = batch.input_ids.clone()
        real = batch.label_ids != IGNORE_INDEX
        ids[batch.label_positions[real]] = batch.label_ids[real]
        for token in ids[~torch.from_numpy(SPECIAL)[ids]].tolist():
            found[token] = found.get(token, 0) + 1
    tokens, counts = np.unique(np.concatenate(documents), return_counts=True)
    assert found == dict(zip(tokens.tolist(), counts.tolist(), strict=True))


def test_epochs_differ_in_order_and_masks(rows: Rows, masker: Masker) -> None:
    """The second epoch has the same rows in another order with other masks."""
    batches = TrainBatches(rows, masker, 1, BatchSplit(1, 1, 1), 0)
    first = {row_numbers(batches, i)[0]: batches[i].input_ids for i in range(len(rows))}
    second = {row_numbers(batches, i)[0]: batches[i].input_ids for i in range(len(rows), 2 * len(rows))}
    assert list(first) != list(second)
    assert first.keys() == second.keys()
    assert any(not torch.equal(first[row], second[row]) for row in first)


def test_documents_and_positions_are_marked(rows: Rows, masker: Masker) -> None:
    """cu_seqlens delimit [CLS] ... [SEP] pieces and positions count from 0 in each."""
    batch = TrainBatches(rows, masker, 1, BatchSplit(1, 1, 4), 0)[0]
    bounds = batch.cu_seqlens.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == batch.num_tokens
    for start, end in itertools.pairwise(bounds):
        assert batch.input_ids[start] == 2
        assert batch.input_ids[end - 1] == 3
        assert batch.position_ids[start:end].tolist() == list(range(end - start))
    assert batch.num_labels == int((batch.label_ids != IGNORE_INDEX).sum())


def test_evaluation_masks_never_change(rows: Rows, masker: Masker) -> None:
    """Two evaluations see the same batches, and the batch size does not matter."""
    one, two = EvalBatches(rows, masker, 1, 4), EvalBatches(rows, masker, 1, 8)
    assert torch.equal(one[1].input_ids, one[1].input_ids)
    assert torch.equal(torch.cat([one[0].input_ids, one[1].input_ids]), two[0].input_ids)
    assert sum(two[i].num_tokens for i in range(len(two))) == sum(len(rows.row(i)[0]) for i in range(len(rows)))


@pytest.mark.parametrize(
    ("per_device", "accumulation", "total", "world_size", "expected"),
    [
        (16, 4, None, 2, BatchSplit(2, 4, 16)),
        (16, 1, 64, 2, BatchSplit(2, 2, 16)),
        (16, 1, 64, 8, BatchSplit(8, 1, 8)),
        (5, 1, 12, 2, BatchSplit(2, 2, 3)),
    ],
)
def test_split_keeps_the_global_batch(per_device, accumulation, total, world_size, expected) -> None:
    """The microbatch is the largest divisor that fits."""
    trainer = TrainerConfig(
        per_device_train_batch_size=per_device, gradient_accumulation_steps=accumulation, global_batch_size=total
    )
    assert split_batch(trainer, world_size) == expected


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UsageError, match="10 rows, which do not divide over 4 ranks"):
        split_batch(TrainerConfig(global_batch_size=10), 4)
