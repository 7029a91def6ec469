"""Show what an exported model guesses for masked words of held-out text.

python -m enc.tools.fill_mask runs/quickstart/hf/600 --store tokenized_data/quickstart
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from enc.encoder.data.store import TokenStore
from enc.encoder.keyed import numpy_rng

_SENTENCE_TOKENS = 18


def held_out_sentences(store: Path, count: int) -> list[list[int]]:
    """Return the beginnings of `count` documents of a store's eval split, as token ids."""
    documents = TokenStore.open(store).split("eval")
    long_enough = [i for i, n in enumerate(documents.lengths) if n >= 8]
    chosen = numpy_rng(0, "fill_mask").permutation(long_enough)[:count]
    return [documents[int(i)][:_SENTENCE_TOKENS].tolist() for i in chosen]


def guesses(folder: Path, sentences: list[list[int]], top: int = 5) -> list[tuple[str, str, list[str]]]:
    """Mask the middle token of each sentence; return (text with the gap, the word that stood there, the guesses)."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True).eval()
    results = []
    for ids in sentences:
        gap = len(ids) // 2
        masked = [*ids[:gap], tokenizer.mask_token_id, *ids[gap + 1 :]]
        inputs = torch.tensor([[tokenizer.cls_token_id, *masked, tokenizer.sep_token_id]])
        place = (inputs[0] == tokenizer.mask_token_id).nonzero()[0, 0]
        with torch.no_grad():
            best = model(inputs).logits[0, place].topk(top).indices.tolist()
        words = [str(tokenizer.decode([i])).strip() for i in best]
        results.append((str(tokenizer.decode(masked)), str(tokenizer.decode([ids[gap]])), words))
    return results


def main() -> None:
    """Print the guesses for a few held-out sentences."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="exported folder")
    parser.add_argument("--store", type=Path, required=True, help="token store with an eval split")
    parser.add_argument("--count", type=int, default=5)
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()
    for text, word, words in guesses(options.model, held_out_sentences(options.store, options.count)):
        print(f"{text}\n    was: {word}   guessed: {', '.join(words)}\n")


if __name__ == "__main__":
    main()
