"""Masked and permuted rows (MPNet, arXiv 2004.09297): which tokens a document predicts, in which order, seeing what.

Of each document piece ``mlm_probability`` of the ordinary tokens are predicted, rounded up or down by chance, in a
random order; of a row at least one. The order of the other tokens means nothing, so tokens stay where they are in the
text and stages carry the permutation (``kernels/attention_rules.py``): the j-th predicted token appears at stage j + 1,
its placeholder goes away there.

A piece of L tokens that predicts P of them becomes, for the objective `mpnet`, the rows

    L tokens as they are | P placeholders | P queries        of which tokens and placeholders are keys

and for `plm` (XLNet's) the same without placeholders. Placeholders and queries have the positions of the predicted
tokens, ascending, and show them corrupted as in BERT; with `plm` queries show the mask token.

Whole words: words are permuted and laid out one after the other, the last P tokens are predicted, so one word may be
cut; among themselves the P are in random order. That is annotated-mpnet's rule.
"""

from typing import Any

import numpy as np

from enc.encoder.data.masking import MaskedRow, Masker, Streams


def permuted_row(
    index: int, ids: np.ndarray, lengths: np.ndarray, masker: Masker, rng: np.random.Generator, placeholders: bool
) -> MaskedRow:
    """Permute each piece of a row; `ids` (n,) are its tokens, special ones too, `lengths` (pieces,) their numbers."""
    pieces = np.split(ids, np.cumsum(lengths)[:-1])
    orders = [masker.permute(piece, rng) for piece in pieces]
    if not any(map(len, orders)):
        fullest = int(np.argmax([(~masker.is_special[piece]).sum() for piece in pieces]))
        orders[fullest] = masker.permute(pieces[fullest], rng, least=1)
    parts = [_piece(piece, order, masker, rng, placeholders) for piece, order in zip(pieces, orders, strict=True)]
    joined = [np.concatenate(arrays) for arrays in zip(*(part[:-1] for part in parts), strict=True)]
    shown, positions, labels, stages, key_stages, is_key = joined
    predicted = np.array([part[-1] for part in parts], np.int64)
    key_lengths = lengths + predicted * placeholders
    row_lengths = key_lengths + predicted
    starts = np.cumsum(row_lengths) - row_lengths
    places = np.concatenate([start + np.arange(keys, rows) for start, keys, rows in zip(
        starts, key_lengths, row_lengths, strict=True)])  # fmt: skip
    streams = Streams(row_lengths, np.flatnonzero(is_key), stages, key_stages)
    return MaskedRow(index, shown, key_lengths, positions, places, labels, len(ids), streams)


def _piece(
    ids: np.ndarray, order: np.ndarray, masker: Masker, rng: np.random.Generator, placeholders: bool
) -> tuple[Any, ...]:
    """Return (what is shown, positions, labels, stages of rows, of keys, which rows are keys, P) of one piece.

    `order` (P,) are the positions that are predicted, as they are.
    """
    rank = np.argsort(order)  # of the predicted positions, ascending: which of them is predicted when
    predicted, when = order[rank], rank.astype(np.int32)
    labels, stages = ids[predicted], np.zeros(len(ids), np.int32)
    stages[predicted] = when + 1
    keys, copies = stages, [np.full_like(labels, masker.mask_id)]
    if placeholders:
        keys, copies = np.concatenate([stages, -(when + 1)]), 2 * [masker.shown(labels, rng)]
        stages = np.concatenate([stages, np.zeros_like(when)])
    stages = np.concatenate([stages, when])
    positions = np.concatenate([np.arange(len(ids)), *(predicted for _ in copies)])
    is_key = np.arange(len(stages)) < len(keys)
    return np.concatenate([ids, *copies]), positions, labels, stages, keys, is_key, len(order)
