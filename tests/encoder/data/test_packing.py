"""Packing: every token exactly once, full rows, the same plan for the same input."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from enc.encoder.data.packing import cut_documents, pack_histogram, plan_rows


def covered(plan, document_lengths) -> list[np.ndarray]:
    """Return for each document how often each of its tokens stands in a row."""
    counts = [np.zeros(n, int) for n in document_lengths]
    for document, offset, length in zip(plan.documents, plan.offsets, plan.lengths, strict=True):
        counts[document][offset : offset + length] += 1
    return counts


@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=60),
    row_length=st.integers(8, 130),
    special=st.integers(0, 2),
    pack=st.booleans(),
    seed=st.integers(0, 5),
)
def test_every_token_stands_in_exactly_one_row(lengths, row_length, special, pack, seed) -> None:
    """Whatever the lengths, nothing is dropped, doubled or put into a row that it does not fit."""
    plan = plan_rows(np.array(lengths, np.int32), row_length, special, seed, pack)
    assert all((count == 1).all() for count in covered(plan, lengths))
    sizes = np.add.reduceat(plan.lengths + special, plan.row_starts[:-1])
    assert sizes.max() <= row_length
    assert plan.num_tokens == sum(lengths) + special * len(plan.lengths)
    if not pack:
        assert plan.num_rows == len(plan.lengths)


@given(st.lists(st.integers(1, 64), min_size=1, max_size=200), st.integers(64, 80))
def test_histogram_packing_places_every_piece(lengths, row_length) -> None:
    """The groups hold each length as often as it was given, and no row overflows."""
    counts = np.bincount(lengths, minlength=row_length + 1)
    placed = np.zeros_like(counts)
    for repeat, content in pack_histogram(counts, row_length):
        assert sum(content) <= row_length
        np.add.at(placed, list(content), repeat)
    assert (placed == counts).all()


def test_no_row_could_take_another_one() -> None:
    """Best fit leaves no two rows that would fit into one."""
    lengths = np.random.default_rng(0).integers(1, 100, 500)
    groups = pack_histogram(np.bincount(lengths, minlength=129), 128)
    sums = sorted(sum(content) for repeat, content in groups for _ in range(repeat))
    assert sums[0] + sums[1] > 128


@pytest.mark.parametrize(("mean", "row_length"), [(300, 512), (60, 512), (1000, 1024), (300, 1024)])
def test_rows_of_natural_lengths_are_full(mean: int, row_length: int) -> None:
    """Log-normal document lengths fill at least 99 % of the rows."""
    lengths = np.maximum(1, np.random.default_rng(1).lognormal(np.log(mean), 1.0, 20_000)).astype(np.int32)
    assert plan_rows(lengths, row_length, 2, 0).fill >= 0.99


def test_cost_does_not_grow_with_the_corpus() -> None:
    """The search sees a histogram: a thousand times the documents give as many groups."""
    lengths = np.random.default_rng(2).integers(1, 512, 5_000)
    counts = np.bincount(lengths, minlength=513)
    assert len(pack_histogram(counts * 1000, 512)) <= 3 * len(pack_histogram(counts, 512))


def test_plan_depends_on_the_seed_alone() -> None:
    """The same input gives the same plan; another seed draws other documents of a length."""
    lengths = np.random.default_rng(3).integers(1, 100, 2_000).astype(np.int32)
    one, same, other = (plan_rows(lengths, 128, 2, seed) for seed in (7, 7, 8))
    assert np.array_equal(one.documents, same.documents)
    assert not np.array_equal(one.documents, other.documents)


def test_long_documents_are_cut_into_full_pieces() -> None:
    """1000 tokens in rooms of 300 are 300 + 300 + 300 + 100."""
    documents, offsets, lengths = cut_documents(np.array([1000, 300, 5]), 300)
    assert documents.tolist() == [0, 0, 0, 0, 1, 2]
    assert offsets.tolist() == [0, 300, 600, 900, 0, 0]
    assert lengths.tolist() == [300, 300, 300, 100, 300, 5]
