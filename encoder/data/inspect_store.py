"""What is in a token store, for a person: sizes, lengths, unknown and repeated text, a few documents."""

from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from enc.encoder.data.store import Documents, TokenStore
from enc.encoder.data.store_writer import count_unknown
from enc.encoder.data.tokenizer import EncoderTokenizer

LONGEST_SAMPLE = 240  # characters of a document that are shown


def inspect_store(path: str | Path, num_samples: int = 3) -> dict[str, Any]:
    """Return what a token store holds, split by split; all of its tokens are read once.

    Raises:
        UsageError: as `TokenStore.open`.
    """
    store = TokenStore.open(path)
    tokenizer = EncoderTokenizer.load(store.tokenizer_dir)
    manifest = store.manifest
    splits = {split: store.split(split) for split in store.splits}
    hashes = {split: _hashes(documents) for split, documents in splits.items()}
    trained = np.unique(hashes["train"])
    return {
        "store": str(store.path.absolute()),
        "fingerprint": store.fingerprint,
        "source": {key: manifest["request"]["source"].get(key) for key in ("kind", "location")},
        "sources": manifest.get("sources", {}),
        "bad_rows": manifest.get("bad_rows"),
        "tokenizer": manifest["tokenizer"],
        "splits": {
            split: {
                **_sizes(documents, manifest.get("statistics", {}).get(split, {}).get("characters"), tokenizer),
                "lengths": _lengths(documents.lengths),
                "repeated_documents": len(documents) - len(np.unique(hashes[split])),
                "also_in_train": None if split == "train" else int(np.isin(hashes[split], trained).sum()),
                "samples": _samples(documents, tokenizer, num_samples),
            }
            for split, documents in splits.items()
        },
    }


def _hashes(documents: Documents) -> np.ndarray:
    return np.fromiter((xxhash.xxh3_64_intdigest(ids.tobytes()) for ids in documents), np.uint64, len(documents))


def _sizes(documents: Documents, characters: int | None, tokenizer: EncoderTokenizer) -> dict[str, Any]:
    num_tokens = int(documents.lengths.sum(dtype=np.int64))
    unknown = np.zeros(2, np.int64)
    for lengths, ids in documents.batches():
        unknown += count_unknown(lengths, ids, tokenizer.unknown_id)
    return {
        "documents": len(documents),
        "tokens": num_tokens,
        "characters_per_token": characters / num_tokens if characters else None,
        "unknown_tokens": int(unknown[0]),
        "unknown_documents": int(unknown[1]),
    }


def _lengths(lengths: np.ndarray) -> dict[str, Any]:
    """Return how long documents are, in tokens, and how many there are from each power of two to the next."""
    classes = np.frexp(lengths.astype(np.float64))[1] - 1  # the exponent of the power of two that is not above
    tokens = np.bincount(classes, weights=lengths).astype(np.int64)
    documents = np.bincount(classes)
    return {
        "shortest": int(lengths.min()),
        "median": float(np.median(lengths)),
        "mean": float(lengths.mean()),
        "longest": int(lengths.max()),
        "histogram": [
            {"from": 2**c, "to": 2 ** (c + 1) - 1, "documents": int(documents[c]), "tokens": int(tokens[c])}
            for c in range(int(classes.min()), len(documents))
        ],
    }


def _samples(documents: Documents, tokenizer: EncoderTokenizer, number: int) -> list[dict[str, Any]]:
    """Return some documents from the first to the last, decoded, without their ends where they are long."""
    indices = np.unique(np.linspace(0, len(documents) - 1, number).astype(int)).tolist()
    return [{"document": i, "tokens": len(documents[i]), "text": _decoded(documents[i], tokenizer)} for i in indices]


def _decoded(ids: np.ndarray, tokenizer: EncoderTokenizer) -> str:
    text = tokenizer.tokenizer.decode(ids[:LONGEST_SAMPLE].tolist(), skip_special_tokens=False)
    return text if len(text) <= LONGEST_SAMPLE and len(ids) <= LONGEST_SAMPLE else text[:LONGEST_SAMPLE] + "…"
