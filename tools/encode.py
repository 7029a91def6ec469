"""Vectors of texts: the mean of their hidden states, in a file of numpy or Parquet.

Shapes: N texts, T tokens, E hidden size.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from enc.encoder.errors import UsageError
from enc.tools.output import new_output, refuse_taken
from enc.tools.trained import Trained

SUFFIXES = (".npy", ".parquet")
_BATCH_TOKENS = 16384
_NO_LINES = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".arrow", ".gz", ".zst", ".bz2", ".xz", ".zip")


def refuse_files(source: Path, out: Path) -> None:
    """Raise UsageError unless `source` is a file of lines and `out` free, with an ending that can be written."""
    if out.suffix not in SUFFIXES:
        raise UsageError(f"--out {out}: vectors are written as {' or '.join(SUFFIXES)}. Choose one of these endings.")
    if not source.is_file() or source.suffix.lower() in _NO_LINES:
        raise UsageError(f"{source} is no file of plain text. Give one with a document on each line, in UTF-8.")
    refuse_taken(out, folder=False)


def encode_file(trained: Trained, source: Path, out: Path) -> tuple[int, int]:
    """Write the vector of each line of a file, in its order, and return (N, E).

    `out` is a .npy of fp32 (N, E), or a .parquet with the columns text and vector.

    Raises:
        UsageError: as `refuse_files`, or the file is empty or not in UTF-8.
        RunError: writing failed. Nothing is left behind.
    """
    refuse_files(source, out)
    try:
        lines = source.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"{source} is not in UTF-8: byte {error.start}. Convert it first.") from None
    texts = [line.removesuffix("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]
    if not texts:
        raise UsageError(f"{source} is empty. Give a file with a document on each line.")
    vectors = encode(trained, texts)
    with new_output(out, vectors.nbytes, folder=False) as partial:
        _write(partial, texts, vectors)
    return vectors.shape[0], vectors.shape[1]


def encode(trained: Trained, texts: list[str]) -> np.ndarray:
    """Return the mean hidden state of each text, special tokens included, fp32 (N, E).

    A text that is longer than the rows of training is cut into pieces, and the mean is that of all its tokens.
    """
    sums = np.zeros((len(texts), trained.config.model.hidden_size), dtype=np.float32)
    counts = np.zeros(len(texts), dtype=np.int64)
    for batch in _batches(trained, texts):
        pieces = [ids for _, ids in batch]
        hidden = trained.states(pieces).float().split([len(ids) for ids in pieces])
        for (row, ids), states in zip(batch, hidden, strict=True):
            sums[row] += states.sum(0).cpu().numpy()
            counts[row] += len(ids)
    return sums / counts[:, None].astype(np.float32)


def _batches(trained: Trained, texts: list[str]) -> Iterator[list[tuple[int, list[int]]]]:
    """Yield the framed pieces of texts, each with the number of its text, some tokens at a time."""
    batch: list[tuple[int, list[int]]] = []
    size = 0
    for row, text in enumerate(texts):
        ids = trained.ids(text)
        for start in range(0, max(len(ids), 1), trained.room):
            piece = trained.framed(ids[start : start + trained.room])
            if batch and size + len(piece) > _BATCH_TOKENS:
                yield batch
                batch, size = [], 0
            batch.append((row, piece))
            size += len(piece)
    yield batch


def _write(path: Path, texts: list[str], vectors: np.ndarray) -> None:
    if path.suffix == ".npy":
        np.save(path, vectors)
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    pq.write_table(pa.table({"text": texts, "vector": column}), path)
