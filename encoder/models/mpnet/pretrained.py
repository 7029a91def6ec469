"""Starting a run from an MPNet in Hugging Face's layout (`model.init_from`).

A folder has ``config.json`` and ``model.safetensors``, as transformers writes them and as `enc ckpt export` does. What
can go wrong is found by reading the config and the file's header: `check` and `notes` need no torch, so a launch asks
them before anything is written. `load` fills a model.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from enc.encoder.errors import UsageError
from enc.encoder.files import lfs_advice, read_json
from enc.encoder.models.mpnet.architecture import MPNET
from enc.encoder.models.mpnet.config import MpnetConfig
from enc.encoder.models.vocabulary import padded_vocab_size

if TYPE_CHECKING:
    from enc.encoder.models.mpnet.model import MpnetForMaskedLM

HF_BUCKETS, HF_MAX_DISTANCE, HF_PAD_ID = 32, 128, 1  # of transformers' MPNet, whatever its config says
_HF_OFFSET = 2  # its max_position_embeddings counts the rows of the table, two of which are of no position
_VOCABULARY = ("mpnet.embeddings.word_embeddings.weight", "lm_head.bias")

# Key of the model section -> key of transformers' MPNetConfig and the default of that class.
_NATIVE: dict[str, tuple[str, Any]] = {
    "hidden_size": ("hidden_size", 768),
    "num_hidden_layers": ("num_hidden_layers", 12),
    "num_attention_heads": ("num_attention_heads", 12),
    "intermediate_size": ("intermediate_size", 3072),
    "hidden_act": ("hidden_act", "gelu"),
    "norm_eps": ("layer_norm_eps", 1e-12),
    "dropout_prob": ("hidden_dropout_prob", 0.1),
    "attention_dropout_prob": ("attention_probs_dropout_prob", 0.1),
    "initializer_range": ("initializer_range", 0.02),
}
_OWN = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings",
    "hidden_act", "normalize_before", "relative_attention_num_buckets", "relative_attention_max_distance", "norm_eps",
    "dropout_prob", "attention_dropout_prob", "activation_dropout_prob", "initializer_range",
)  # fmt: skip
# What must be as in the folder for its weights to mean the same; positions may be more, dropout is free.
_ARCHITECTURE = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "norm_eps",
    "normalize_before", "relative_attention_num_buckets", "relative_attention_max_distance",
)  # fmt: skip


@dataclass(frozen=True)
class Pretrained:
    """A folder whose config and header were read and go together."""

    folder: Path
    keys: dict[str, Any]
    """Of the model section."""
    num_tokens: int
    """Rows of its vocabulary."""
    names: dict[str, str]
    """Name of a parameter here -> name in the file; the head's are absent where the folder has none."""

    @property
    def file(self) -> Path:
        return self.folder / "model.safetensors"

    @property
    def has_head(self) -> bool:
        return "lm_head.bias" in self.names


def mpnet_keys(found: dict[str, Any], where: Path) -> dict[str, Any]:
    """Return the keys of the model section that a config.json stands for. Raises UsageError when it is no MPNet's."""
    if found.get("model_type") == "enc_mpnet":
        return {key: found[key] for key in _OWN if key in found}
    if found.get("model_type") != "mpnet":
        raise UsageError(
            f"{where} is of a model of type {found.get('model_type')!r}, not an MPNet. Name the folder of an MPNet."
        )
    keys = {key: found.get(name, default) for key, (name, default) in _NATIVE.items()}
    buckets, act = found.get("relative_attention_num_buckets", HF_BUCKETS), keys["hidden_act"]
    if buckets != HF_BUCKETS:
        raise UsageError(
            f"{where} says relative_attention_num_buckets {buckets}, but transformers' MPNet computes with "
            f"{HF_BUCKETS} whatever it says, so what these weights were trained with is not known. Import the training "
            "checkpoint itself: `enc ckpt import`."
        )
    if act != "gelu":
        raise UsageError(
            f"{where} says hidden_act {act!r}, but the head of transformers' MPNet has gelu; here both have the same. "
            "Name an MPNet with gelu."
        )
    rows = found.get("max_position_embeddings", 512)
    if not isinstance(rows, int) or rows <= _HF_OFFSET:
        raise UsageError(f"{where} says max_position_embeddings {rows!r}, must be a whole number above {_HF_OFFSET}.")
    positions = rows - _HF_OFFSET
    relative = {
        "relative_attention_num_buckets": HF_BUCKETS,
        "relative_attention_max_distance": HF_MAX_DISTANCE,
    }
    return {**keys, "max_position_embeddings": positions, "normalize_before": False, **relative}


def own_name(name: str) -> str | None:
    """Return the name here of a tensor of MPNetModel or MPNetForMaskedLM; None for what there is none of here.

    That is the pooler, which no pretraining trains, and second names of the tied head.
    """
    if name == "lm_head.decoder.bias":
        return "lm_head.bias"
    if name.startswith("lm_head."):
        return None if name == "lm_head.decoder.weight" else name
    name = name.removeprefix("mpnet.")
    return None if name.startswith("pooler.") or name.endswith("position_ids") else f"mpnet.{name}"


def open_pretrained(folder: Path) -> Pretrained:
    """Read a folder's config and header. Raises UsageError when they are missing, damaged or of another model."""
    found = _read_json(folder / "config.json", f"model.init_from {folder} is no folder with a config.json")
    keys, num_tokens = mpnet_keys(found, folder / "config.json"), found.get("vocab_size", 30527)
    if found.get("tie_word_embeddings") is False:
        raise UsageError(f"model.init_from {folder} has an untied head; here the head is the embedding.")
    file = folder / "model.safetensors"
    if not file.is_file():
        raise UsageError(
            f"model.init_from {folder} has no model.safetensors. Write it from what is there: `enc ckpt consolidate "
            f"{folder} --out {file}`."
        )
    try:
        with safe_open(file, framework="numpy") as tensors:
            shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        damage = lfs_advice(file) or f"{file} is damaged or cannot be read: {error}. Copy it again."
        raise UsageError(damage) from None
    names = {own: name for name in shapes if (own := own_name(name))}
    wanted = MPNET.shapes(_section(keys, num_tokens))
    if not any(name.startswith("lm_head.") for name in names):
        wanted = {name: shape for name, shape in wanted.items() if not name.startswith("lm_head.")}
    bad = [name for name, shape in wanted.items() if name not in names or shapes[names[name]] != shape]
    bad += [name for name in names if name not in wanted]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise UsageError(
            f"{file} does not hold what the config.json beside it describes: {', '.join(bad[:3])}{more} is missing, "
            "unknown or of another shape. Copy both from the same model."
        )
    return Pretrained(folder, keys, num_tokens, names)


def _section(keys: dict[str, Any], num_tokens: int) -> MpnetConfig:
    try:
        return MpnetConfig(**keys).model_copy(update={"vocab_size": num_tokens})
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))} {e['input']!r}: {e['msg']}" for e in error.errors())
        raise UsageError(f"The config.json of model.init_from has values that no MPNet has: {wrong}.") from None


# --- before a launch -------------------------------------------------------------------------------------------------


def check(
    folder: Path, model: MpnetConfig, trains_tokenizer: bool, num_tokens: int | None, tokenizer_dir: Path | None
) -> None:
    """Compare the folder of `model.init_from` with a model section and its tokenizer, as far as that is there already.

    Raises UsageError when the folder is not whole or does not go with them.
    """
    found = open_pretrained(folder)
    if trains_tokenizer:
        raise UsageError(
            f"model.init_from {found.folder} brings a vocabulary, and tokenizer.train makes another one. Name the "
            "tokenizer that the weights were trained with in tokenizer.path, or drop model.init_from."
        )
    if differing := _differing(model, found.keys):
        listed = ", ".join(f"{key} {ours!r} (there {theirs!r})" for key, ours, theirs in differing)
        words = " ".join(f"model.{key}={str(theirs).lower()}" for key, _, theirs in differing)
        raise UsageError(
            f"The model section does not fit the weights of model.init_from {found.folder}: {listed}. Write {words}, "
            "or name another folder."
        )
    if num_tokens is not None:
        _check_tokens(found, num_tokens)
    if tokenizer_dir is not None:
        _check_vocabulary(found.folder / "tokenizer.json", tokenizer_dir / "tokenizer.json")


def _differing(model: MpnetConfig, keys: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (key, value here, value of the folder) of what must be the same and is not."""
    ours = model.model_dump() | {
        "relative_attention_num_buckets": model.num_buckets,
        "relative_attention_max_distance": model.max_distance,
    }
    found = [(key, ours[key], keys[key]) for key in _ARCHITECTURE if key in keys and not _same(ours[key], keys[key])]
    positions = "max_position_embeddings"
    return found + ([(positions, ours[positions], keys[positions])] if ours[positions] < keys[positions] else [])


def _same(a: Any, b: Any) -> bool:
    return math.isclose(a, b, rel_tol=1e-6) if isinstance(a, float) else a == b


def _check_tokens(found: Pretrained, num_tokens: int) -> None:
    """Raise UsageError unless every row of the folder's vocabulary is a token's or fills it up to a multiple of 128."""
    if found.num_tokens not in (num_tokens, padded_vocab_size(num_tokens)):
        raise UsageError(
            f"The tokenizer has {num_tokens} tokens, the weights of model.init_from {found.folder} are for "
            f"{found.num_tokens}. Use the tokenizer that they were trained with: tokenizer.path={found.folder}"
        )


def _check_vocabulary(theirs: Path, ours: Path) -> None:
    """Raise UsageError when both tokenizers are known and a token has another id in one of them."""
    if not (theirs.is_file() and ours.is_file()):
        return
    there, here = (_vocabulary(_read_json(path, f"{path} is no tokenizer")) for path in (theirs, ours))
    if not there or not here:
        return
    other = [token for token in sorted(there.keys() | here.keys()) if there.get(token) != here.get(token)]
    if other:
        token = other[0]
        raise UsageError(
            f"The tokenizer of the token store is not that of model.init_from {theirs.parent}: {len(other)} tokens "
            f"have other ids, {token!r} for one has {here.get(token, 'none')} here and {there.get(token, 'none')} "
            f"there. Use the tokenizer that the weights were trained with: tokenizer.path={theirs.parent}"
        )


def _vocabulary(tokenizer: dict[str, Any]) -> dict[str, int]:
    """Return the ids of a tokenizer.json's tokens; none for a kind of model that does not name them so."""
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    tokens = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    return vocab | {token.get("content"): token.get("id") for token in tokens} if isinstance(vocab, dict) else {}


def notes(folder: Path, model: MpnetConfig) -> list[str]:
    """Return what of the first weights does not come from the folder of `model.init_from`, a sentence each."""
    found, said = open_pretrained(folder), []
    if not found.has_head:
        said.append(f"{found.folder} has no language-model head (lm_head); it starts with weights drawn from the seed.")
    extra = model.max_position_embeddings - found.keys["max_position_embeddings"]
    if extra > 0:
        said.append(f"{found.folder} has no embedding of the last {extra} positions; they are drawn from the seed.")
    return said


def _read_json(path: Path, otherwise: str) -> dict[str, Any]:
    try:
        content = read_json(path)
    except OSError as error:
        raise UsageError(f"{otherwise} ({error.strerror}). Name the folder of an MPNet.") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON ({error}). Copy it again.") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds no config. Copy it again.")
    return content


# --- at the start of a run -------------------------------------------------------------------------------------------


def load(model: "MpnetForMaskedLM", folder: Path, num_tokens: int) -> None:
    """Fill a model that has its first weights with those of a folder; rows of the vocabulary that no token has are 0.

    Raises UsageError when the folder or its number of tokens does not fit.
    """
    import torch  # the checks above must not wait for it

    found = open_pretrained(folder)
    _check_tokens(found, num_tokens)
    with torch.no_grad(), safe_open(found.file, framework="pt") as tensors:
        for name, parameter in model.named_parameters():
            if name not in found.names:
                continue
            tensor = tensors.get_tensor(found.names[name]).to(parameter.dtype)
            if name in _VOCABULARY:
                parameter.zero_()
                tensor = tensor[:num_tokens]
            if parameter.shape[1:] != tensor.shape[1:] or len(parameter) < len(tensor):
                raise UsageError(f"{name} of {found.file} does not fit the model section of this run.")
            parameter[: len(tensor)] = tensor
