"""How well tokenizers suit a text: how many tokens they make of it, and what of it they do not know."""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from enc.encoder.data.config import DatasetConfig, TokenizerConfig
from enc.encoder.data.obtain import obtain_tokenizer
from enc.encoder.data.sources.documents import read_documents
from enc.encoder.data.sources.find import resolve_source
from enc.encoder.data.store_writer import count_unknown
from enc.encoder.data.tokenizer import EncoderTokenizer
from enc.encoder.errors import UsageError


def text_sample(source: str, num_documents: int) -> list[str]:
    """Return the first documents of a local source. Raises UsageError when there are none."""
    dataset = DatasetConfig(path=source)
    documents = islice(read_documents(resolve_source(dataset), dataset, 0), num_documents)
    texts = [document.text for document in documents if isinstance(document.text, str)]
    if not texts:
        raise UsageError(f"{source} holds ids of tokens, not text. Name a text.")
    return texts


def compare_tokenizers(own: EncoderTokenizer, others: Iterable[str], texts: list[str]) -> list[dict[str, Any]]:
    """Return what each tokenizer makes of the texts; those that cannot be had say why."""
    return [_measured(own.name, own, texts), *(_other(name, texts) for name in others)]


def _other(name: str, texts: list[str]) -> dict[str, Any]:
    try:
        tokenizer = obtain_tokenizer(TokenizerConfig(name=name, allow_special_token_rewrite=True), list)
    except UsageError as error:
        why = str(error) if Path(name).is_dir() else "neither a folder nor in the hub's cache on this machine"
        return {"tokenizer": name, "missing": why}
    return _measured(name, tokenizer, texts)


def _measured(name: str, tokenizer: EncoderTokenizer, texts: list[str]) -> dict[str, Any]:
    encoded = tokenizer.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    ids = np.concatenate([np.array(encoding.ids, np.int64) for encoding in encoded])
    lengths = np.array([len(encoding.ids) for encoding in encoded])
    unknown, unknown_documents = count_unknown(lengths[lengths > 0], ids, tokenizer.unknown_id)
    num_tokens = max(1, len(ids))
    return {
        "tokenizer": name,
        "vocabulary": tokenizer.num_tokens,
        "tokens": len(ids),
        "characters_per_token": sum(map(len, texts)) / num_tokens,
        "bytes_per_token": sum(len(text.encode()) for text in texts) / num_tokens,
        "tokens_per_word": len(ids) / max(1, sum(len(text.split()) for text in texts)),
        "unknown_share": unknown / num_tokens,
        "unknown_documents": unknown_documents,
        "used_share_of_vocabulary": len(np.unique(ids)) / tokenizer.num_tokens,
    }
