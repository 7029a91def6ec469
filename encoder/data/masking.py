"""Which tokens of a row are labels, and what the model sees in their place.

The number of labels of a row is fixed: ``round(mlm_probability * ordinary tokens)``, at least one; special tokens are
never labels. Positions are drawn without replacement from the generator that is passed in, so they depend on its key
alone. A label is shown as the mask token (80 %), as a random ordinary token (10 %) or unchanged (10 %), as in BERT.
What is permuted as well: ``enc.encoder.data.permutation``.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from enc.encoder.config.schema import RunConfig
from enc.encoder.data.tokenizer import EncoderTokenizer


class Streams(NamedTuple):
    """What a row has beside tokens when it is permuted; X positions, T of them keys."""

    lengths: np.ndarray  # (pieces,) positions of each piece
    key_indices: np.ndarray  # (T,) int64
    stages: np.ndarray  # (X,) int32
    key_stages: np.ndarray  # (T,) int32


@dataclass(frozen=True)
class MaskedRow:
    """One packed row after masking."""

    ids: np.ndarray  # (X,) what the model sees
    lengths: np.ndarray  # (pieces,) tokens of each piece, with placeholders
    positions: np.ndarray  # (X,) position in the piece
    label_positions: np.ndarray  # (k,) in the row
    labels: np.ndarray  # (k,) label ids
    num_tokens: int  # of the text
    streams: Streams | None = None


@dataclass(frozen=True)
class Masker:
    """Draws labels and corrupts rows; one instance serves all rows."""

    mask_id: int
    is_special: np.ndarray  # (V,) bool
    ordinary_ids: np.ndarray  # ids that may stand in as a random token: those of tokens, but special ones
    continues_word: np.ndarray  # (V,) bool
    probability: float
    mask_prob: float = 0.8
    random_prob: float = 0.1
    whole_word: bool = False
    objective: str = "mlm"

    @classmethod
    def of(cls, tokenizer: EncoderTokenizer, config: RunConfig) -> "Masker":
        """Make a run's masker for a tokenizer; ids of no token are never drawn."""
        collator = config.datacollator
        is_special = np.zeros(tokenizer.num_tokens, bool)
        is_special[list(tokenizer.special_ids)] = True
        return cls(
            mask_id=tokenizer.mask_id,
            is_special=is_special,
            ordinary_ids=np.flatnonzero(tokenizer.is_token & ~is_special),
            continues_word=tokenizer.continues_word,
            probability=collator.mlm_probability,
            mask_prob=1.0 if collator.mask_all else collator.mask_replace_prob,
            random_prob=0.0 if collator.mask_all else collator.random_replace_prob,
            whole_word=collator.whole_word,
            objective=config.trained_objective,
        )

    def can_mask(self, ids: np.ndarray) -> bool:
        """Tell whether any of some tokens may be a label."""
        return not self.is_special[ids].all()

    def num_labels(self, num_ordinary: int) -> int:
        """Return how many of so many ordinary tokens become labels."""
        return min(max(1, round(self.probability * num_ordinary)), num_ordinary)

    def mask(
        self, ids: np.ndarray, piece_starts: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (what the model sees, label positions ascending, label ids) of one row.

        `ids` (n,) is the row with its special tokens, `piece_starts` the first position of each document piece in it.
        """
        ordinary = np.flatnonzero(~self.is_special[ids])
        count = self.num_labels(len(ordinary))
        if self.whole_word:
            positions = self._choose_words(ids, ordinary, piece_starts, count, rng)
        else:
            positions = rng.choice(ordinary, count, replace=False, shuffle=False)
        positions.sort()
        labels = ids[positions]
        seen = ids.copy()
        seen[positions] = self.shown(labels, rng)
        return seen, positions, labels

    def permute(self, ids: np.ndarray, rng: np.random.Generator, least: int = 0) -> np.ndarray:
        """Return the positions that a document piece predicts, in the order in which it does. (P,) of `ids` (n,)

        Their number is `probability` of the ordinary tokens, rounded up or down by chance, so that the rate holds for
        any length; at least `least` where there are as many.
        """
        ordinary = np.flatnonzero(~self.is_special[ids])
        count = min(max(int(self.probability * len(ordinary) + rng.random()), least), len(ordinary))
        if not self.whole_word or not count:
            return rng.choice(ordinary, count, replace=False)
        words = self._words(ids, ordinary, np.zeros(1, np.int64))
        laid_out = np.concatenate([words[i] for i in rng.permutation(len(words))])
        return rng.permutation(laid_out[-count:])

    def shown(self, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return what stands in the place of labels, any shape."""
        if self.mask_prob == 1:
            return np.full_like(labels, self.mask_id)
        draw = rng.random(len(labels))
        random_ids = self.ordinary_ids[rng.integers(len(self.ordinary_ids), size=len(labels))]
        kept_from = self.mask_prob + self.random_prob
        return np.where(draw < self.mask_prob, self.mask_id, np.where(draw < kept_from, random_ids, labels))

    def _choose_words(
        self, ids: np.ndarray, ordinary: np.ndarray, piece_starts: np.ndarray, count: int, rng: np.random.Generator
    ) -> np.ndarray:
        """Take words in random order while they fit; a word that would exceed `count` is passed over.

        When every word left is too long (a row that is one long word), the first of them is cut to fit.
        """
        if not len(ordinary):
            return ordinary
        words = self._words(ids, ordinary, piece_starts)
        words = [words[i] for i in rng.permutation(len(words))]
        chosen: list[np.ndarray] = []
        room = count
        for word in words:
            if len(word) <= room:
                chosen.append(word)
                room -= len(word)
            if not room:
                break
        return np.concatenate(chosen) if chosen else words[0][:count].copy()

    def _words(self, ids: np.ndarray, ordinary: np.ndarray, piece_starts: np.ndarray) -> list[np.ndarray]:
        """Return the positions of each word, of at least one ordinary token."""
        begins = ~self.continues_word[ids[ordinary]]
        begins |= np.isin(ordinary, piece_starts)
        begins |= np.diff(ordinary, prepend=-2) > 1  # a special token ends a word; true for the first place
        return np.split(ordinary, np.flatnonzero(begins)[1:])
