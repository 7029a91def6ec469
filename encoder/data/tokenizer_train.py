"""Training a tokenizer on documents."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import accumulate, islice

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from enc.encoder.data.config import TokenizerTrainConfig
from enc.encoder.data.tokenizer import TRAINED_SPECIALS, EncoderTokenizer, describe, special_tokens_template
from enc.encoder.errors import UsageError
from enc.encoder.progress import Show, shown

# Characters of a WordPiece vocabulary, as in BERT, as long as that is enough of the text, and never more than a quarter
# of the vocabulary: the rest become [UNK].
ALPHABET = 1000
COVERAGE = 0.999
_ROLES_IN_ORDER = (("pad", "unk", "cls", "sep", "mask"), ("cls", "pad", "sep", "unk", "mask"))  # by the padding's id


def train_tokenizer(
    train: TokenizerTrainConfig, read_texts: Callable[[], Iterable[str]], pad_id: int = 0
) -> EncoderTokenizer:
    """Train a WordPiece (BERT's normaliser) or byte-level BPE tokenizer; the same texts give the same tokenizer.

    A small corpus may give fewer than `train.vocab_size` tokens. The special
    tokens come first: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, [MASK] 4, or with `pad_id` 1 in MPNet's order, [CLS] 0,
    [PAD] 1, [SEP] 2, [UNK] 3, [MASK] 4. Each call of `read_texts` starts the texts from
    the first; WordPiece reads them twice, because its alphabet has to be known before its pieces.

    Raises:
        UsageError: there is no text, or too few tokens for the bytes of BPE.
    """
    build = {"wordpiece": _train_wordpiece, "bpe": _train_bpe}[train.model]
    specials = {role: TRAINED_SPECIALS[role] for role in _ROLES_IN_ORDER[pad_id]}
    with shown("Training the tokenizer") as show:
        texts = partial(_counted, read_texts, train.max_documents, show)
        tokenizer = build(train, texts, list(specials.values()))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials.values()])
    tokenizer.post_processor = special_tokens_template(tokenizer, specials["cls"], specials["sep"])
    return describe(tokenizer, dict(specials), f"{train.model}-{tokenizer.get_vocab_size()}")


def _counted(read_texts: Callable[[], Iterable[str]], most: int | None, show: Show) -> Iterator[str]:
    for number, text in enumerate(islice(read_texts(), most), 1):
        show(0, None, f"{number:,} documents read")
        yield text


def _train_wordpiece(
    train: TokenizerTrainConfig, read_texts: Callable[[], Iterator[str]], specials: list[str]
) -> Tokenizer:
    """Train WordPiece so that it does not depend on the order of a hash table.

    The trainer numbers the pieces `##x` of single characters as it meets them in a randomly seeded hash map, and
    breaks ties between merges by these numbers. So they are given to it in sorted order, as if special, and the
    vocabulary alone is kept.
    """
    scratch = _wordpiece_pipeline(models.WordPiece(unk_token=TRAINED_SPECIALS["unk"]), train.lowercase)
    alphabet = _alphabet(scratch, read_texts(), train)
    assert scratch.pre_tokenizer is not None
    joined = [c for c in alphabet if len(scratch.pre_tokenizer.pre_tokenize_str(f"a{c}a")) == 1]
    first = [*specials, *alphabet, *(f"##{c}" for c in joined)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=train.vocab_size,
        min_frequency=train.min_frequency,
        special_tokens=first,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    scratch.train_from_iterator(read_texts(), trainer)
    vocab = scratch.get_vocab(with_added_tokens=False)
    longest = train.max_input_chars_per_word
    model = models.WordPiece(vocab=vocab, unk_token=TRAINED_SPECIALS["unk"], max_input_chars_per_word=longest)
    return _wordpiece_pipeline(model, train.lowercase)


def _wordpiece_pipeline(model: models.WordPiece, lowercase: bool) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _alphabet(tokenizer: Tokenizer, texts: Iterable[str], train: TokenizerTrainConfig) -> list[str]:
    """Return the most frequent characters of the normalised texts, sorted."""
    assert tokenizer.normalizer is not None
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(tokenizer.normalizer.normalize_str(text))
    ranked = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))
    if not ranked:
        raise UsageError("There is no text to train a tokenizer on. Check dataset.name and dataset.min_text_length.")
    needed = _needed([counts[c] for c in ranked])
    return sorted(ranked[: train.limit_alphabet or min(max(ALPHABET, needed), train.vocab_size // 4)])


def _needed(counts: list[int]) -> int:
    """Return how many characters, whose counts fall, make up enough of a text."""
    covered = list(accumulate(counts))
    return bisect_left(covered, COVERAGE * covered[-1]) + 1


def _train_bpe(train: TokenizerTrainConfig, read_texts: Callable[[], Iterator[str]], specials: list[str]) -> Tokenizer:
    smallest = len(pre_tokenizers.ByteLevel.alphabet()) + len(TRAINED_SPECIALS)
    if train.vocab_size < smallest:
        raise UsageError(
            f"tokenizer.train.vocab_size={train.vocab_size} has no room for the bytes and special tokens of byte-level "
            f"BPE: give {smallest} or more, or use tokenizer.train.model=wordpiece."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=train.vocab_size,
        min_frequency=train.min_frequency,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(read_texts(), trainer)
    return tokenizer
