"""Masking: fixed counts, special and inert ids never touched, keyed draws, BERT's mix."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from enc.encoder.config.schema import RunConfig
from enc.encoder.data.masking import Masker
from enc.encoder.data.tokenizer import describe
from enc.encoder.keyed import numpy_rng

VOCABULARY, MASK = 100, 4
SPECIAL = np.arange(VOCABULARY) < 5


def masker(**options) -> Masker:
    continues = np.arange(VOCABULARY) >= 60  # ids from 60 on continue a word
    defaults = {"probability": 0.2, "whole_word": False}
    return Masker(MASK, SPECIAL, np.flatnonzero(~SPECIAL), continues, **(defaults | options))


def row(seed: int = 0, length: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """A row of three documents with [CLS] 2 and [SEP] 3."""
    rng = np.random.default_rng(seed)
    third = length // 3
    ids = rng.integers(5, VOCABULARY, 3 * third)
    starts = np.arange(3) * third
    ids[starts], ids[starts + third - 1] = 2, 3
    return ids, starts


def test_label_count_is_fixed_and_specials_are_never_labels() -> None:
    """round(p * ordinary tokens) labels, whatever the draw."""
    ids, starts = row()
    ordinary = int((~SPECIAL[ids]).sum())
    for draw in range(50):
        seen, positions, labels = masker().mask(ids, starts, numpy_rng(0, "mask", draw))
        assert len(positions) == round(0.2 * ordinary)
        assert (np.diff(positions) > 0).all()
        assert not SPECIAL[ids[positions]].any()
        assert (labels == ids[positions]).all()
        untouched = np.setdiff1d(np.arange(len(ids)), positions)
        assert (seen[untouched] == ids[untouched]).all()


def test_mix_is_80_10_10() -> None:
    """Over many labels the shares are BERT's, random tokens are ordinary ones and uniform."""
    ids, starts = row(length=30_000)
    seen, positions, labels = masker(probability=0.5).mask(ids, starts, numpy_rng(1, "mask"))
    shown = seen[positions]
    masked, kept = (shown == MASK).mean(), (shown == labels).mean()
    assert abs(masked - 0.8) < 0.01
    assert abs(kept - 0.1) < 0.01  # the random tokens hit the label itself in 1 % of 10 %
    random = shown[(shown != MASK) & (shown != labels)]
    assert not SPECIAL[random].any()
    assert np.bincount(random, minlength=VOCABULARY)[5:].min() > 0


def test_mask_all_shows_the_mask_only() -> None:
    ids, starts = row()
    seen, positions, _ = masker(mask_prob=1.0, random_prob=0.0).mask(ids, starts, numpy_rng(2, "mask"))
    assert (seen[positions] == MASK).all()


def test_labels_are_drawn_evenly() -> None:
    """Each ordinary position is a label equally often (chi-square far below a gross error)."""
    ids, starts = row(length=60)
    hits = np.zeros(len(ids))
    for draw in range(4000):
        _, positions, _ = masker().mask(ids, starts, numpy_rng(3, "mask", draw))
        hits[positions] += 1
    ordinary = hits[~SPECIAL[ids]]
    expected = ordinary.mean()
    assert ((ordinary - expected) ** 2 / expected).sum() < 2 * len(ordinary)


def test_one_ordinary_token_is_still_a_label() -> None:
    """A row always has a label."""
    _, positions, labels = masker(probability=0.01).mask(np.array([2, 50, 3]), np.array([0]), numpy_rng(0, "mask"))
    assert positions.tolist() == [1]
    assert labels.tolist() == [50]


@pytest.mark.parametrize("draw", range(20))
def test_whole_words_are_chosen_whole(draw: int) -> None:
    """A word is a label in all of its pieces or in none, and the count never exceeds the fixed one."""
    ids, starts = row(seed=draw)
    options = masker(whole_word=True, mask_prob=1.0, random_prob=0.0)
    _, positions, _ = options.mask(ids, starts, numpy_rng(draw, "mask"))
    chosen = np.zeros(len(ids), bool)
    chosen[positions] = True
    for i in range(1, len(ids)):
        same_word = ids[i] >= 60 and not SPECIAL[ids[i - 1]] and i not in starts
        if same_word:
            assert chosen[i] == chosen[i - 1]
    limit = options.num_labels(int((~SPECIAL[ids]).sum()))
    assert limit - 2 <= len(positions) <= limit


def test_a_word_longer_than_the_count_is_cut() -> None:
    """A row that is one long word still gets labels."""
    ids = np.array([2, *range(60, 90), 3])
    _, positions, _ = masker(whole_word=True).mask(ids, np.array([0]), numpy_rng(0, "mask"))
    assert len(positions) == 6


def test_ids_of_no_token_are_never_drawn() -> None:
    """A vocabulary may have holes, and random tokens are tokens."""
    words = {"<pad>": 0, "<mask>": 1, "a": 2, "b": 3, "c": 40, "d": 90}
    tokenizer = describe(Tokenizer(models.WordLevel(words, unk_token="a")), {"pad": "<pad>", "mask": "<mask>"}, "holes")
    drawn = Masker.of(tokenizer, RunConfig())
    assert drawn.ordinary_ids.tolist() == [2, 3, 40, 90]
    labels = np.full(3000, 2)
    shown = drawn.shown(labels, numpy_rng(3, "mask"))
    assert set(shown.tolist()) == {1, 2, 3, 40, 90}
