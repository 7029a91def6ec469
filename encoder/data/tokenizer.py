"""Tokenizers: train one, fetch one, save it, and what training needs to know about it.

A saved tokenizer is a folder in Hugging Face layout (`tokenizer.json`, `tokenizer_config.json`,
`special_tokens_map.json`) that `AutoTokenizer` loads. Everything here runs on the `tokenizers` library alone;
transformers, whose import costs seconds, is used only to fetch or convert a tokenizer that is not in this layout yet.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, processors

from enc.encoder.errors import UsageError
from enc.encoder.files import read_json, write_json

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
_PROBE = "Two words."  # encoded to see what a tokenizer puts around a text
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


@dataclass(frozen=True, eq=False)
class EncoderTokenizer:
    """A tokenizer with the facts that data preparation, masking and the model need.

    `num_tokens` is the highest id + 1. `cls_id` and `sep_id` (BOS and EOS where a tokenizer has these instead) are
    None if it has none. `special_ids` are never masked. `continues_word`, bool (num_tokens,), marks the tokens that go
    on with the word before them, for whole-word masking; the first token of a document starts a word whatever it says.
    `is_token`, bool (num_tokens,), is false for ids that no token has: some vocabularies have holes.
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
    is_token: np.ndarray

    @classmethod
    def load(cls, folder: str | Path) -> "EncoderTokenizer":
        """Load a tokenizer folder in Hugging Face layout.

        Raises:
            UsageError: the folder has no readable tokenizer.json, or the tokenizer has no mask or no padding token.
        """
        folder = Path(folder)
        tokenizer, roles = read_folder(folder)
        for role in ("mask", "pad"):
            if role not in roles:
                raise UsageError(f"The tokenizer in {folder} has no {role} token. {ALLOW_REWRITE}")
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
        write_json(folder / "tokenizer_config.json", config, indent=2)
        write_json(folder / "special_tokens_map.json", names, indent=2)

    @property
    def unknown_id(self) -> int | None:
        """The id of text that the vocabulary has no token for; None if there is one for every text."""
        of_unigram = json.loads(self.tokenizer.to_str())["model"].get("unk_id")
        return self._unk_id() if of_unigram is None else of_unigram

    def _unk_id(self) -> int | None:
        token = getattr(self.tokenizer.model, "unk_token", None)
        return self.tokenizer.token_to_id(token) if token else None


ALLOW_REWRITE = (
    "Masked training needs one: choose a tokenizer made for masked models, set "
    "tokenizer.allow_special_token_rewrite=true to add RoBERTa-style special tokens, or train one with tokenizer.train."
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
        is_token=_is_token(vocab, num_tokens),
    )


def write_training_rows(tokenizer: Tokenizer, roles: dict[str, str]) -> bool:
    """Make a tokenizer give a text as a row of training holds it, `cls text sep`; return whether it gave another.

    Tokenizers may come without a post-processor, or write one of the two alone, or both at the end.
    """
    first, last = ([tokenizer.token_to_id(roles[role])] if role in roles else [] for role in ("cls", "sep"))
    plain = tokenizer.encode(_PROBE, add_special_tokens=False).ids
    if tokenizer.encode(_PROBE).ids == [*first, *plain, *last]:
        return False
    tokenizer.post_processor = special_tokens_template(tokenizer, roles.get("cls"), roles.get("sep"))
    return True


def mend_saved(folder: Path) -> None:
    """Make a saved tokenizer give what its model was trained on; most do already, and their files stay as they are."""
    tokenizer, roles = read_folder(folder)
    if write_training_rows(tokenizer, roles):
        (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")


def fingerprint(tokenizer_json: str) -> str:
    """Return 32 hexadecimal digits of a tokenizer.json, the same however it is laid out, truncated or padded."""
    content = json.loads(tokenizer_json) | {"truncation": None, "padding": None}
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _is_token(vocab: dict[str, int], num_tokens: int) -> np.ndarray:
    is_token = np.zeros(num_tokens, dtype=bool)
    is_token[list(vocab.values())] = True
    is_token.setflags(write=False)
    return is_token


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


def read_folder(folder: Path) -> tuple[Tokenizer, dict[str, str]]:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UsageError(f"{folder} is no tokenizer folder: it has no tokenizer.json.")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception for whatever it cannot parse
        raise UsageError(f"{path} is not a readable tokenizer: {error}. Save the tokenizer again.") from error
    config = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
    return tokenizer, find_roles(tokenizer, config)


def find_roles(tokenizer: Tokenizer, config: dict[str, Any]) -> dict[str, str]:
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
        content = read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}. Save the tokenizer again.") from error
    return content if isinstance(content, dict) else {}


def special_tokens_template(tokenizer: Tokenizer, cls: str | None, sep: str | None) -> processors.TemplateProcessing:
    """Return the post-processor that puts `cls` before a text and `sep` after it, or either alone."""
    first, last = [cls] if cls else [], [sep] if sep else []
    return processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *last, "$B:1", *(f"{token}:1" for token in last)],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (*first, *last)],
    )
