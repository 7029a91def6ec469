"""Which tokens of a row are labels, and what the model sees in their place.

The number of labels of a row is fixed: ``round(mlm_probability * ordinary tokens)``, at least one; special tokens are
never labels. Positions are drawn without replacement from the generator that is passed in, so they depend on its key
alone. A label is shown as the mask token (80 %), as a random ordinary token (10 %) or unchanged (10 %), as in BERT.
"""

from dataclasses import dataclass

import numpy as np

from enc.encoder.data.tokenizer import EncoderTokenizer


@dataclass(frozen=True)
class Masker:
    """Draws labels and corrupts rows; one instance serves all rows."""

    mask_id: int
    is_special: np.ndarray  # (V,) bool
    ordinary_ids: np.ndarray  # (V - specials,) ids that may stand in as a random token
    continues_word: np.ndarray  # (V,) bool
    probability: float
    mask_all: bool = False
    whole_word: bool = False

    @classmethod
    def of(cls, tokenizer: EncoderTokenizer, probability: float, mask_all: bool, whole_word: bool) -> "Masker":
        """Make a masker for a tokenizer; ids past its last token are never drawn."""
        is_special = np.zeros(tokenizer.num_tokens, bool)
        is_special[list(tokenizer.special_ids)] = True
        ordinary = np.flatnonzero(~is_special)
        return cls(tokenizer.mask_id, is_special, ordinary, tokenizer.continues_word, probability, mask_all, whole_word)

    def num_labels(self, num_ordinary: int) -> int:
        """Return how many of a row's ordinary tokens become labels."""
        return max(1, round(self.probability * num_ordinary))

    def mask(
        self, ids: np.ndarray, piece_starts: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (what the model sees, label positions ascending, label ids) of one row.

        `ids` (n,) is the row with its special tokens, `piece_starts` the first position of each document piece in it.
        """
        ordinary = np.flatnonzero(~self.is_special[ids])
        count = min(self.num_labels(len(ordinary)), len(ordinary))
        if self.whole_word:
            positions = self._choose_words(ids, ordinary, piece_starts, count, rng)
        else:
            positions = rng.choice(ordinary, count, replace=False, shuffle=False)
        positions.sort()
        labels = ids[positions]
        seen = ids.copy()
        seen[positions] = self._shown(labels, rng)
        return seen, positions, labels

    def _shown(self, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if self.mask_all:
            return np.full_like(labels, self.mask_id)
        draw = rng.random(len(labels))
        random_ids = self.ordinary_ids[rng.integers(len(self.ordinary_ids), size=len(labels))]
        return np.where(draw < 0.8, self.mask_id, np.where(draw < 0.9, random_ids, labels))

    def _choose_words(
        self, ids: np.ndarray, ordinary: np.ndarray, piece_starts: np.ndarray, count: int, rng: np.random.Generator
    ) -> np.ndarray:
        """Take words in random order while they fit; a word that would exceed `count` is passed over.

        When every word left is too long (a row that is one long word), the first of them is cut to fit.
        """
        if not len(ordinary):
            return ordinary
        begins = ~self.continues_word[ids[ordinary]]
        begins |= np.isin(ordinary, piece_starts)
        begins |= np.diff(ordinary, prepend=-2) > 1  # a special token ends a word; true for the first place
        words = np.split(ordinary, np.flatnonzero(begins)[1:])
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
