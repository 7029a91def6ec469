"""Tokenizers: train one, fetch one, save it, and what training needs to know about it.

A saved tokenizer is a folder in Hugging Face layout (`tokenizer.json`, `tokenizer_config.json`,
`special_tokens_map.json`) that `AutoTokenizer` loads. Everything here runs on the `tokenizers` library alone;
transformers, whose import costs seconds, is used only to fetch or convert a tokenizer that is not in this layout yet.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from enc.encoder.errors import UsageError

if TYPE_CHECKING:
    from enc.encoder.data.config import TokenizerConfig, TokenizerTrainConfig

TRAINED_SPECIALS = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
ROBERTA_SPECIALS = {"cls": "<s>", "sep": "</s>", "unk": "<unk>", "pad": "<pad>", "mask": "<mask>"}
# the names under which a Hugging Face tokenizer_config.json may keep each role, best first
ROLE_KEYS = {
    "pad": ("pad_token",),
    "unk": ("unk_token",),
    "cls": ("cls_token", "bos_token"),
    "sep": ("sep_token", "eos_token"),
    "mask": ("mask_token",),
}
# files by which a local tokenizer folder is recognised
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
MAX_ALPHABET = (
    1000  # characters of a WordPiece vocabulary, as in BERT, or a quarter of a small one: the rest become [UNK]
)


@dataclass(frozen=True, eq=False)
class EncoderTokenizer:
    """A tokenizer with the facts that data preparation, masking and the model need.

    `num_tokens` is the highest id + 1. `cls_id` and `sep_id` (BOS and EOS where a tokenizer has these instead) are
    None if it has none. `special_ids` are never masked. `continues_word`, bool (num_tokens,), marks the tokens that go
    on with the word before them, for whole-word masking; the first token of a document starts a word whatever it says.
    """

    tokenizer: Tokenizer
    name: str
    num_tokens: int
    mask_id: int
    pad_id: int
    cls_id: int | None
    sep_id: int | None
    special_ids: tuple[int, ...]
    continues_word: np.ndarray

    @classmethod
    def load(cls, folder: str | Path) -> EncoderTokenizer:
        """Load a tokenizer folder in Hugging Face layout.

        Raises:
            UsageError: the folder has no readable tokenizer.json, or the tokenizer has no mask or no padding token.
        """
        folder = Path(folder)
        tokenizer, roles = _read_folder(folder)
        for role in ("mask", "pad"):
            if role not in roles:
                raise UsageError(f"The tokenizer in {folder} has no {role} token. {_ALLOW_REWRITE}")
        return describe(tokenizer, roles, _saved_name(folder))

    def fingerprint(self) -> str:
        """Return 32 hexadecimal digits that are equal for tokenizers that give equal ids."""
        return fingerprint(self.tokenizer.to_str())

    def info(self) -> dict[str, Any]:
        """Return the content of `tokenizer_info.json`: name, sizes and ids."""
        return {
            "tokenizer_name": self.name,
            "vocab_size": self.num_tokens,
            "base_vocab_size": self.tokenizer.get_vocab_size(with_added_tokens=False),
            "total_vocab_size": self.tokenizer.get_vocab_size(with_added_tokens=True),
            "pad_token_id": self.pad_id,
            "mask_token_id": self.mask_id,
            "cls_token_id": self.cls_id,
            "sep_token_id": self.sep_id,
            "special_token_ids": list(self.special_ids),
        }

    def save(self, folder: str | Path) -> None:
        """Write the folder that `load` and `AutoTokenizer.from_pretrained` read."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        roles = {
            "pad": self.pad_id,
            "mask": self.mask_id,
            "cls": self.cls_id,
            "sep": self.sep_id,
            "unk": self._unk_id(),
        }
        names = {f"{role}_token": self.tokenizer.id_to_token(i) for role, i in roles.items() if i is not None}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
        (folder / "tokenizer.json").write_text(self.tokenizer.to_str(pretty=True), encoding="utf-8")
        _write_json(folder / "tokenizer_config.json", config)
        _write_json(folder / "special_tokens_map.json", names)

    def _unk_id(self) -> int | None:
        token = getattr(self.tokenizer.model, "unk_token", None)
        return self.tokenizer.token_to_id(token) if token else None


_ALLOW_REWRITE = (
    "Masked training needs one: choose a tokenizer made for masked models, set "
    "tokenizer.allow_special_token_rewrite=true to "
    "add RoBERTa-style special tokens, or train one with tokenizer.train."
)


def describe(tokenizer: Tokenizer, roles: dict[str, str], name: str) -> EncoderTokenizer:
    """Return the `EncoderTokenizer` of a tokenizer whose special tokens have these roles (pad, unk, cls, sep, mask)."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    num_tokens = max(vocab.values()) + 1
    added = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    ids = {role: vocab[token] for role, token in roles.items()}
    return EncoderTokenizer(
        tokenizer=tokenizer,
        name=name,
        num_tokens=num_tokens,
        mask_id=ids["mask"],
        pad_id=ids["pad"],
        cls_id=ids.get("cls"),
        sep_id=ids.get("sep"),
        special_ids=tuple(sorted(added | set(ids.values()))),
        continues_word=_continues_word(tokenizer, vocab, added | set(ids.values()), num_tokens),
    )


def fingerprint(tokenizer_json: str) -> str:
    """Return 32 hexadecimal digits of a tokenizer.json, the same however it is laid out, truncated or padded."""
    content = json.loads(tokenizer_json) | {"truncation": None, "padding": None}
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _continues_word(tokenizer: Tokenizer, vocab: dict[str, int], special: set[int], num_tokens: int) -> np.ndarray:
    continues = np.zeros(num_tokens, dtype=bool)
    starts_word = _word_start_rule(tokenizer, vocab)
    for token, index in vocab.items():
        continues[index] = index not in special and not starts_word(token)
    continues.setflags(write=False)
    return continues


def _word_start_rule(tokenizer: Tokenizer, vocab: dict[str, int]) -> Any:
    """Return the predicate "this token starts a word" for the marking that the tokenizer uses."""
    if isinstance(tokenizer.model, models.WordPiece):
        prefix = tokenizer.model.continuing_subword_prefix
        return lambda token: not token.startswith(prefix)
    if isinstance(tokenizer.model, models.WordLevel):
        return lambda token: True
    if '"ByteLevel"' in _pipeline(tokenizer):
        white_space = tuple("ĠĊĉč")  # the byte-level alphabet's blank, newline, tab and carriage return
        return lambda token: token.startswith(white_space)
    if any(token.startswith("▁") for token in vocab):
        return lambda token: token.startswith("▁")
    return lambda token: True  # nothing marks words: every token is its own


def _pipeline(tokenizer: Tokenizer) -> str:
    content = json.loads(tokenizer.to_str())
    return json.dumps({key: content[key] for key in ("normalizer", "pre_tokenizer", "decoder")})


# ------------------------------------------------------------------------------------------------------------ reading


def _read_folder(folder: Path) -> tuple[Tokenizer, dict[str, str]]:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UsageError(f"{folder} is no tokenizer folder: it has no tokenizer.json.")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception for whatever it cannot parse
        raise UsageError(f"{path} is not a readable tokenizer: {error}. Save the tokenizer again.") from error
    config = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
    return tokenizer, _find_roles(tokenizer, config)


def _find_roles(tokenizer: Tokenizer, config: dict[str, Any]) -> dict[str, str]:
    """Return role -> token from a tokenizer_config.json, else by the usual names."""
    roles = {}
    for role, keys in ROLE_KEYS.items():
        named = [_token_text(config.get(key)) for key in keys]
        for token in (*named, TRAINED_SPECIALS[role], ROBERTA_SPECIALS[role]):
            if token and tokenizer.token_to_id(token) is not None:
                roles[role] = token
                break
    return roles


def _token_text(value: Any) -> str | None:
    return value.get("content") if isinstance(value, dict) else value


def _saved_name(folder: Path) -> str:
    return str(_read_json(folder.parent / "tokenizer_info.json").get("tokenizer_name") or folder.absolute().name)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}. Save the tokenizer again.") from error
    return content if isinstance(content, dict) else {}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------ getting a tokenizer


def obtain_tokenizer(config: TokenizerConfig, read_texts: Callable[[], Iterable[str]]) -> EncoderTokenizer:
    """Return the tokenizer that a tokenizer section asks for: trained on the texts, from a folder, or from the hub.

    Raises:
        UsageError: it cannot be found or read, or it has no mask token and may not be given one.
    """
    if config.train is not None:
        return train_tokenizer(config.train, read_texts)
    folder = local_folder(config)
    if folder is not None and (folder / "tokenizer.json").is_file():
        tokenizer, roles = _read_folder(folder)
    else:
        tokenizer, roles = _fetch(config, folder)
    name = str(folder.absolute()) if folder is not None else str(config.name)
    tokenizer, roles = complete_specials(tokenizer, roles, name, bool(config.allow_special_token_rewrite))
    return describe(tokenizer, roles, name)


def local_folder(config: TokenizerConfig) -> Path | None:
    """Return the folder that a tokenizer section names, or None for a name of the hub.

    Raises:
        UsageError: `tokenizer.path` is set and is no folder.
    """
    if config.path:
        folder = Path(config.path).expanduser()
        if not folder.is_dir():
            raise UsageError(f"tokenizer.path: {folder} is not a folder. Give the folder that holds tokenizer.json.")
        return folder
    folder = Path(str(config.name)).expanduser()
    return folder if folder.is_dir() else None


def identity(config: TokenizerConfig) -> dict[str, Any]:
    """Return the JSON description of the tokenizer that a section asks for, without loading or fetching it.

    A local folder is known by the checksums of its files, a hub tokenizer by name and revision, a trained one by how
    it is trained. Where a tokenizer.json is at hand, its fingerprint is added.
    """
    if config.train is not None:
        return {"train": dict(config.train)}
    rewrite = bool(config.allow_special_token_rewrite)
    folder = local_folder(config)
    if folder is None:
        return {"name": config.name, "revision": config.revision, "allow_special_token_rewrite": rewrite}
    contents = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
    files = {name: hashlib.blake2b(content, digest_size=16).hexdigest() for name, content in contents.items()}
    described: dict[str, Any] = {"files": files, "allow_special_token_rewrite": rewrite}
    if "tokenizer.json" in contents:
        try:
            described["fingerprint"] = fingerprint(contents["tokenizer.json"].decode())
        except (ValueError, TypeError) as error:
            raise UsageError(f"{folder / 'tokenizer.json'} is not a readable tokenizer: {error}.") from error
    return described


def _fetch(config: TokenizerConfig, folder: Path | None) -> tuple[Tokenizer, dict[str, str]]:
    """Get a tokenizer through transformers, which downloads it or converts its older formats."""
    from transformers import AutoTokenizer

    source = str(folder) if folder is not None else config.name
    try:
        fetched = AutoTokenizer.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code, use_fast=True
        )
        tokenizer = fetched.backend_tokenizer
    except Exception as error:  # hub client, network libraries and converters each raise their own
        raise UsageError(
            f"Cannot get the tokenizer {source!r}: {' '.join(str(error).split())} Check the name and the network, "
            f"give a "
            "folder with tokenizer.json in tokenizer.path, or train one on the corpus with "
            "tokenizer.train.model=wordpiece."
        ) from error
    named = {key: getattr(fetched, key, None) for keys in ROLE_KEYS.values() for key in keys}
    return tokenizer, _find_roles(tokenizer, named)


def complete_specials(
    tokenizer: Tokenizer, roles: dict[str, str], name: str, allow_rewrite: bool
) -> tuple[Tokenizer, dict[str, str]]:
    """Add what is missing: a padding token always; a mask token, with the whole RoBERTa-style set, only if allowed.

    Raises:
        UsageError: there is no mask token and `allow_rewrite` is false.
    """
    if "mask" not in roles:
        if not allow_rewrite:
            raise UsageError(f"The tokenizer {name} has no mask token. {_ALLOW_REWRITE}")
        roles = dict(ROBERTA_SPECIALS)
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in roles.values()])
        tokenizer.post_processor = _wrap(tokenizer, roles["cls"], roles["sep"])
    if "pad" not in roles:
        roles = {**roles, "pad": ROBERTA_SPECIALS["pad"]}
        tokenizer.add_special_tokens([AddedToken(roles["pad"], special=True, normalized=False)])
    return tokenizer, roles


def _wrap(tokenizer: Tokenizer, cls: str, sep: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (cls, sep)],
    )


# ----------------------------------------------------------------------------------------------------------- training


def train_tokenizer(train: TokenizerTrainConfig, read_texts: Callable[[], Iterable[str]]) -> EncoderTokenizer:
    """Train a WordPiece (BERT's normaliser) or byte-level BPE tokenizer; the same texts give the same tokenizer.

    `train.model` is "wordpiece" or "bpe"; a small corpus may give fewer than `train.vocab_size` tokens. The special
    tokens come first: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, [MASK] 4. Each call of `read_texts` starts the texts from
    the first; WordPiece reads them twice, because its alphabet has to be known before its pieces.

    Raises:
        UsageError: there is no text, or `train.model` is unknown.
    """
    build = {"wordpiece": _train_wordpiece, "bpe": _train_bpe}.get(train.model)
    if build is None:
        raise UsageError(f"tokenizer.train.model: {train.model!r} is not one of wordpiece, bpe.")
    tokenizer = build(train, lambda: islice(read_texts(), train.max_documents))
    specials = TRAINED_SPECIALS
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials.values()])
    tokenizer.post_processor = _wrap(tokenizer, specials["cls"], specials["sep"])
    return describe(tokenizer, dict(specials), f"{train.model}-{tokenizer.get_vocab_size()}")


def _train_wordpiece(train: TokenizerTrainConfig, read_texts: Callable[[], Iterator[str]]) -> Tokenizer:
    """Train WordPiece so that it does not depend on the order of a hash table.

    The trainer numbers the pieces `##x` of single characters as it meets them in a randomly seeded hash map, and
    breaks ties between merges by these numbers. So they are given to it in sorted order, as if special, and the
    vocabulary alone is kept.
    """
    scratch = _wordpiece_pipeline(models.WordPiece(unk_token=TRAINED_SPECIALS["unk"]), train.lowercase)
    alphabet = _alphabet(scratch, read_texts(), limit=min(MAX_ALPHABET, train.vocab_size // 4))
    assert scratch.pre_tokenizer is not None
    joined = [c for c in alphabet if len(scratch.pre_tokenizer.pre_tokenize_str(f"a{c}a")) == 1]
    first = [*TRAINED_SPECIALS.values(), *alphabet, *(f"##{c}" for c in joined)]
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
    model = models.WordPiece(vocab=vocab, unk_token=TRAINED_SPECIALS["unk"], max_input_chars_per_word=100)
    return _wordpiece_pipeline(model, train.lowercase)


def _wordpiece_pipeline(model: models.WordPiece, lowercase: bool) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _alphabet(tokenizer: Tokenizer, texts: Iterable[str], limit: int) -> list[str]:
    """Return the most frequent characters of the normalised texts, at most `limit`, sorted."""
    assert tokenizer.normalizer is not None
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(tokenizer.normalizer.normalize_str(text))
    characters = [c for c in counts if not c.isspace()]
    if not characters:
        raise UsageError("There is no text to train a tokenizer on. Check dataset.name and dataset.min_text_length.")
    return sorted(sorted(characters, key=lambda c: (-counts[c], c))[:limit])


def _train_bpe(train: TokenizerTrainConfig, read_texts: Callable[[], Iterator[str]]) -> Tokenizer:
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
        special_tokens=list(TRAINED_SPECIALS.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(read_texts(), trainer)
    return tokenizer


# ----------------------------------------------------------------------------------------------------------- encoding

# White space and punctuation at which BERT's normaliser and pre-tokenizer always part two tokens. Other Unicode spaces
# and control characters stay inside a piece: the normaliser drops some of them, which joins their neighbours.
_BERT_PIECES = re.compile(r"[^ \t\n\r!-/:-@\[-`{-~]+|[!-/:-@\[-`{-~]")
# GPT-2's pre-tokenizer always parts after a run of non-blanks, and after ASCII letters or digits that another ASCII
# character than their own kind follows. Blanks are Unicode's White_Space, which is what its \s means (Python's has 4
# more).
_BLANK = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_GPT2_PIECES = re.compile(
    rf"[{_BLANK}]*[^{_BLANK}A-Za-z0-9]*(?:[A-Za-z]++(?![^\x00-\x7f])|[0-9]++(?![^\x00-\x7f])|[^{_BLANK}]+)|[{_BLANK}]+"
)
MAX_CACHED_PIECES = 200_000  # about 70 MB
LONGEST_CACHED_PIECE = 32  # characters: what is longer (a URL, a line of Chinese) hardly comes again


class _PieceIds(dict[str, list[int]]):
    """Piece of text -> ids, filled by the tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __missing__(self, piece: str) -> list[int]:
        ids = _encode(self._tokenizer, piece)
        if len(piece) <= LONGEST_CACHED_PIECE:
            if len(self) >= MAX_CACHED_PIECES:
                self.clear()
            self[piece] = ids
        return ids


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids  # fast: without character offsets


class DocumentEncoder:
    """Text to ids: those of `tokenizer.encode(text, add_special_tokens=False)`, but faster where that is possible.

    Where the tokenizer cuts text at known places before anything else (BERT's and GPT-2's pre-tokenizers), the ids of
    a text are those of its pieces one after another, and a piece that was seen before is looked up: 3 to 5 times
    faster on prose.
    """

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype) -> None:
        self._tokenizer = tokenizer
        self._dtype = dtype
        self._pieces = _piece_pattern(tokenizer)
        self._ids = _PieceIds(tokenizer)
        added = [re.escape(token.content) for token in tokenizer.get_added_tokens_decoder().values()]
        self._added = re.compile("|".join(added) or r"(?!)")

    @property
    def uses_pieces(self) -> bool:
        """Whether this tokenizer's texts can be encoded piece by piece."""
        return self._pieces is not None

    def __call__(self, text: str) -> np.ndarray:
        """Return the ids of a text, (num_tokens,), without special tokens."""
        if self._pieces is None or self._added.search(text):  # a special token written out in the text spans pieces
            return np.array(_encode(self._tokenizer, text), dtype=self._dtype)
        found = map(self._ids.__getitem__, self._pieces.findall(text))
        return np.fromiter(chain.from_iterable(found), dtype=self._dtype)


def _piece_pattern(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Return the pattern whose matches can be encoded one by one, or None if this pipeline is not known to allow it."""
    content = json.loads(tokenizer.to_str())
    model, normalizer, pre_tokenizer = content["model"], content["normalizer"] or {}, content["pre_tokenizer"] or {}
    if any(token["normalized"] or token["lstrip"] or token["rstrip"] for token in content["added_tokens"]):
        return None
    if model["type"] == "WordPiece" and pre_tokenizer == {"type": "BertPreTokenizer"}:
        return _BERT_PIECES if normalizer.get("type") == "BertNormalizer" else None
    gpt2 = (
        pre_tokenizer.get("type") == "ByteLevel"
        and pre_tokenizer["use_regex"]
        and not pre_tokenizer["add_prefix_space"]
    )
    plain = normalizer.get("type", "Lowercase") == "Lowercase"  # or none; lower case moves no boundary
    return _GPT2_PIECES if model["type"] == "BPE" and gpt2 and plain and not model["dropout"] else None
