"""Find texts that are alike: the nearest vectors of a trained encoder.

    python nearest.py RUN [NUMBER]

Shows the three texts of test.jsonl (see own_text.py) that are nearest to text NUMBER, and how often the nearest one is
of the same package. An encoder that learnt nothing but masked words knows the subject of a text; to find the answer to
a question, it has to be trained on pairs of texts.
"""

import json
import sys
from pathlib import Path

import numpy as np

import enc


def spread(vectors: np.ndarray, size: int = 64) -> np.ndarray:
    """Return unit vectors in the directions in which vectors differ most, each direction made as wide as the others."""
    directions, _, _ = np.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    return directions[:, :size] / np.linalg.norm(directions[:, :size], axis=1, keepdims=True)


def main(run: str, number: int = 8) -> None:
    rows = [json.loads(line) for line in Path("test.jsonl").read_text(encoding="utf-8").splitlines()]
    vectors = spread(enc.encode(enc.load_model(run), [row["text"] for row in rows]))
    likeness = vectors @ vectors.T
    for index in likeness[number].argsort()[::-1][:4]:
        print(f"{likeness[number, index]:.2f}  {rows[index]['package']}: {' '.join(rows[index]['text'].split())[:60]}")
    np.fill_diagonal(likeness, -1)
    names = np.array([row["package"] for row in rows])
    shares = np.unique(names, return_counts=True)[1] / len(names)
    same = (names[likeness.argmax(1)] == names).mean()
    print(f"the nearest is of the same package for {same:.1%} of the texts, by chance for {shares @ shares:.1%}")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
