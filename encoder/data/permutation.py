"""Masked and permuted rows (MPNet, arXiv 2004.09297): which tokens a document predicts, in which order, seeing what.

Of each document piece ``mlm_probability`` of the ordinary tokens are predicted, rounded up or down by chance, in a
random order; of a row at least one. The order of the other tokens means nothing, so tokens stay where they are in the
text and stages carry the permutation (``kernels/attention_rules.py``): the j-th predicted token appears at stage j + 1,
its placeholder goes away there.

A piece of L tokens that predicts P of them becomes, for the objective `mpnet`, the positions

    L tokens as they are | P placeholders | P queries        of which tokens and placeholders are keys

and for `plm` (XLNet's) the same without placeholders. Placeholders and queries have the positions of the predicted
tokens, ascending, and show them corrupted as in BERT; with `plm` queries show the mask token.

Whole words: words are permuted and laid out one after the other, the last P tokens are predicted, so one word may be
cut; among themselves the P are in random order. That is annotated-mpnet's rule.
"""

from typing import NamedTuple

import numpy as np

from enc.encoder.data.masking import MaskedRow, Masker, Streams


class _Piece(NamedTuple):
    """One piece of L tokens that predicts P of them, as X positions, of which T are keys."""

    shown: np.ndarray  # (X,) ids that the model sees
    positions: np.ndarray  # (X,) in the piece
    labels: np.ndarray  # (P,)
    stages: np.ndarray  # (X,) int32
    key_stages: np.ndarray  # (T,) int32
    is_key: np.ndarray  # (X,) bool


def permuted_row(
    ids: np.ndarray, lengths: np.ndarray, masker: Masker, rng: np.random.Generator, placeholders: bool
) -> MaskedRow:
    """Permute each piece of a row; `ids` (n,) are its tokens, special ones too, `lengths` (pieces,) their numbers."""
    texts = np.split(ids, np.cumsum(lengths)[:-1])
    orders = [masker.permute(text, rng) for text in texts]
    if not any(map(len, orders)):
        fullest = int(np.argmax([(~masker.is_special[text]).sum() for text in texts]))
        orders[fullest] = masker.permute(texts[fullest], rng, least=1)
    pieces = [_piece(text, order, masker, rng, placeholders) for text, order in zip(texts, orders, strict=True)]
    row = _Piece(*map(np.concatenate, zip(*pieces, strict=True)))
    predicted = np.array([len(piece.labels) for piece in pieces], np.int64)
    key_lengths = lengths + predicted * placeholders
    all_lengths = key_lengths + predicted
    starts = np.cumsum(all_lengths) - all_lengths
    queries = [start + np.arange(keys, end) for start, keys, end in zip(starts, key_lengths, all_lengths, strict=True)]
    streams = Streams(all_lengths, np.flatnonzero(row.is_key), row.stages, row.key_stages)
    label_positions = np.concatenate(queries)
    return MaskedRow(
        row.shown, key_lengths, row.positions, label_positions, row.labels, num_tokens=len(ids), streams=streams
    )


def _piece(ids: np.ndarray, order: np.ndarray, masker: Masker, rng: np.random.Generator, placeholders: bool) -> _Piece:
    """Lay out one piece; `order` (P,) are the positions that are predicted, in the order in which they are."""
    rank = np.argsort(order)  # of the predicted positions, ascending: which of them is predicted when
    predicted, when = order[rank], rank.astype(np.int32)
    labels, token_stages = ids[predicted], np.zeros(len(ids), np.int32)
    token_stages[predicted] = when + 1
    if placeholders:
        corrupted = masker.shown(labels, rng)  # a placeholder and its query show the same
        shown = [ids, corrupted, corrupted]
        stages = [token_stages, np.zeros_like(when), when]
        key_stages = np.concatenate([token_stages, -(when + 1)])
    else:
        shown = [ids, np.full_like(labels, masker.mask_id)]
        stages = [token_stages, when]
        key_stages = token_stages
    positions = np.concatenate([np.arange(len(ids)), *[predicted] * (len(shown) - 1)])
    is_key = np.arange(len(positions)) < len(key_stages)
    return _Piece(np.concatenate(shown), positions, labels, np.concatenate(stages), key_stages, is_key)
