"""Documents that another tool has tokenised, as the token store keeps them: without special tokens around them."""

import numpy as np

from enc.encoder.data.chunks import Chunk
from enc.encoder.data.tokenizer import EncoderTokenizer
from enc.encoder.errors import UsageError


def stored_ids(chunk: Chunk, tokenizer: EncoderTokenizer, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Return (lengths int32 (N,), ids (sum of lengths,)) of a chunk that holds ids, empty documents left out.

    Raises:
        UsageError: an id is none of the tokenizer's.
    """
    documents = [_bare(ids, tokenizer) for ids in chunk.documents()]
    documents = [ids for ids in documents if len(ids)]
    ids = np.concatenate([np.zeros(0, np.int64), *documents])
    foreign = ids[(ids < 0) | (ids >= tokenizer.num_tokens)]
    if len(foreign):
        raise UsageError(
            f"The source holds the id {foreign[0]}, but the tokenizer {tokenizer.name} has {tokenizer.num_tokens:,} "
            "tokens. Set tokenizer.path or tokenizer.name to the one that made the ids."
        )
    return np.array([len(ids) for ids in documents], np.int32), ids.astype(dtype)


def _bare(ids: np.ndarray, tokenizer: EncoderTokenizer) -> np.ndarray:
    """Take away padding on either side, then the special tokens at the beginning and the end of a text."""
    text = np.flatnonzero(ids != tokenizer.pad_id)
    if not len(text):
        return ids[:0]
    ids = ids[text[0] : text[-1] + 1]
    start = int(ids[0] == tokenizer.cls_id)
    return ids[start : len(ids) - int(len(ids) > start and ids[-1] == tokenizer.sep_id)]
