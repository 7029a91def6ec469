"""What a trained model guesses for masked words: of a text that is given, or of held-out text."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from enc.encoder.data.sources.find import store_path
from enc.encoder.data.store import Documents, TokenStore
from enc.encoder.errors import UsageError
from enc.encoder.keyed import numpy_rng
from enc.tools.trained import Trained

MASKS = ("[MASK]", "<mask>")
_AROUND = 12  # tokens before and after a gap
_BEGINNING = 256  # tokens of a document
_COMMONEST = 100  # tokens that say little
_LOOKED_AT = 1000  # documents


@dataclass(frozen=True)
class Gap:
    """A gap in a text, the guesses for it with their probabilities, best first, and what stood there if known."""

    text: str
    guesses: list[tuple[str, float]]
    word: str | None = None


def fill(trained: Trained, text: str, top: int = 5) -> list[Gap]:
    """Return the guesses for every [MASK] or <mask> of a text. Raises UsageError when it has none, or is too long."""
    own = str(trained.tokenizer.tokenizer.id_to_token(trained.tokenizer.mask_id))
    for mask in MASKS:
        text = text.replace(mask, own)
    ids = trained.ids(text)
    if trained.tokenizer.mask_id not in ids:
        raise UsageError(f"The text has no gap. Write [MASK] where a word is to be guessed: {text[:40]!r}.")
    if len(ids) > trained.room:
        raise UsageError(f"The text has {len(ids)} tokens; the model was trained on {trained.room} at a time. Cut it.")
    return [Gap(text, guesses) for guesses in _guesses(trained, ids, top)]


def fill_held_out(trained: Trained, count: int, top: int = 5) -> list[Gap]:
    """Hide a word that says something in pieces of `count` held-out texts and return the guesses for it.

    Raises UsageError when the run's token store is gone, or has no such text.
    """
    gaps = []
    for ids, place in _drawn(trained, _held_out(trained)):
        masked = [*ids[:place], trained.tokenizer.mask_id, *ids[place + 1 :]]
        text = trained.tokenizer.tokenizer.decode(masked, skip_special_tokens=False)
        word = trained.tokenizer.tokenizer.decode([ids[place]]).strip()
        gaps.append(Gap(text, _guesses(trained, masked, top)[0], word))
        if len(gaps) == count:
            break
    if not gaps:
        raise UsageError("No held-out text has a word to hide. Give a text with [MASK] in it.")
    return gaps


def _held_out(trained: Trained) -> Documents:
    path = store_path(trained.config.dataset)
    if not path.is_dir():
        raise UsageError(f"The token store {path}, from which texts are drawn, is gone. Give a text with [MASK] in it.")
    store = TokenStore.open(path)
    if "eval" not in store.splits:
        raise UsageError(f"{path} holds no text out from training. Give a text with [MASK] in it.")
    return store.split("eval")


def _drawn(trained: Trained, documents: Documents) -> Iterator[tuple[list[int], int]]:
    """Yield pieces of documents in a fixed random order, each with the place of a word that says something."""
    order = numpy_rng(0, "fill_mask").permutation(len(documents))[:_LOOKED_AT]
    beginnings = list(dict.fromkeys(tuple(documents[int(i)][:_BEGINNING].tolist()) for i in order))
    counts = Counter(token for ids in beginnings for token in ids)
    common = {token for token, _ in counts.most_common(_COMMONEST)}
    around = min(_AROUND, (trained.room - 1) // 2)
    for number, ids in enumerate(beginnings):
        telling = [place for place, token in enumerate(ids[:-1]) if token not in common]
        if places := [place for place in telling if _is_word(trained, ids, place)]:
            place = int(numpy_rng(0, "fill_mask", number).choice(places))
            start = max(0, place - around)
            yield list(ids[start : place + around + 1]), place - start


def _is_word(trained: Trained, ids: Sequence[int], place: int) -> bool:
    """Tell whether a token is a whole word of letters."""
    continues, special = trained.tokenizer.continues_word, trained.tokenizer.special_ids
    whole = not continues[ids[place]] and (not continues[ids[place + 1]] or ids[place + 1] in special)
    word = trained.tokenizer.tokenizer.decode([ids[place]]).strip()
    return bool(whole and len(word) > 2 and word.isalpha())


@torch.no_grad()
def _guesses(trained: Trained, ids: list[int], top: int) -> list[list[tuple[str, float]]]:
    """Return (token, probability) of the best guesses for each gap in the ids of a text."""
    framed = trained.framed(ids)
    gaps = [place for place, token in enumerate(framed) if token == trained.tokenizer.mask_id]
    logits = trained.model.logits(trained.states([framed])[gaps])[:, : trained.tokenizer.num_tokens]
    best = logits.float().softmax(-1).topk(min(top, trained.tokenizer.num_tokens))
    decode = trained.tokenizer.tokenizer.decode
    return [
        [(decode([token], skip_special_tokens=False).strip(), chance) for token, chance in zip(*row, strict=True)]
        for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
