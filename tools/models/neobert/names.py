"""Tensors of any NeoBERT training or release under the names and shapes of this package's model.

Known differences: prefixes of wrappers; the first NeoBERT's SwiGLU, which holds w1 above w2 in one matrix `w12`; a tied
head saved as a copy of the embedding; an optimizer that numbers its parameters; another number of vocabulary rows.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from enc.encoder.data.config import DatasetConfig
from enc.encoder.data.tokenizer import EncoderTokenizer
from enc.encoder.errors import UsageError
from enc.encoder.models.architecture import Parameter
from enc.encoder.models.neobert.architecture import NEOBERT
from enc.encoder.models.neobert.config import NeoBertConfig
from enc.encoder.models.vocabulary import padded_vocab_size
from enc.encoder.optim.config import OptimizerConfig
from enc.encoder.optim.state_spec import ADAM, split_kind, state_spec
from enc.encoder.printable import shown
from enc.tools.models.fitting import Derived, Fit, ModelState, refuse_misfits, unused_rows
from enc.tools.readers.names import BUFFERS
from enc.tools.readers.source import Source, Stored

EMBEDDING, HEAD, HEAD_BIAS = "model.encoder.weight", "decoder.weight", "decoder.bias"
_VOCABULARY = (EMBEDDING, HEAD, HEAD_BIAS)
_HUB_FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "rope", "rms_norm",
    "norm_eps", "dropout_prob", "embedding_init_range", "decoder_init_range", "classifier_init_range", "ngpt",
    "final_logit_softcapping",
)  # fmt: skip
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")


def hub_keys(found: dict[str, Any], _file: Path) -> dict[str, Any]:
    """Return the keys of a run config that the content of a NeoBERT's config.json gives."""
    keys = {f"model.{name}": found[name] for name in _HUB_FIELDS if name in found}
    keys["model.hidden_act"] = str(keys.get("model.hidden_act", "swiglu")).lower()
    positions = found.get("max_position_embeddings", found.get("max_length"))
    if not positions:
        return keys
    longest = min(positions, DatasetConfig().max_seq_length)
    return {**keys, "model.max_position_embeddings": positions, "dataset.max_seq_length": longest}


def neobert_state(
    source: Source, model: NeoBertConfig, tokenizer: EncoderTokenizer, optimizer: OptimizerConfig
) -> ModelState:
    """Return the tensors of a NeoBERT source for its tokenizer and an optimizer.

    The model section comes back with what the tensors say of the head: tied or not, with or without a bias. Raises
    UsageError when the tensors do not fit the section or the tokenizer.
    """
    weights, num_tokens = _clean(source.weights), tokenizer.num_tokens
    tied = HEAD not in weights or _same(weights[EMBEDDING], weights[HEAD])
    head = {"tie_word_embeddings": tied, "decoder_bias": HEAD_BIAS in weights, "ngpt": model.ngpt}
    model = model.model_copy(update={**head, "vocab_size": padded_vocab_size(num_tokens)})
    if tied:
        weights.pop(HEAD, None)
    shapes = NEOBERT.shapes(model)
    refuse_misfits(_split(weights), shapes, _VOCABULARY, source.path)
    numbered = any("#" in name for name in source.moments)
    moments = _named(source, weights, NEOBERT.parameters(model)) if numbered else _clean(source.moments)
    fit = Fit(shapes, _VOCABULARY, unused_rows(weights, moments, EMBEDDING), source.path)
    fitted_moments = fit.fitted_moments(_split(moments), state_spec(optimizer, NEOBERT.parameters(model)))
    return ModelState(model, fit.fitted(_split(weights)), fitted_moments)


def _clean(tensors: dict[str, Stored]) -> dict[str, Stored]:
    """Drop prefixes of wrappers and buffers; an encoder saved without its head gets the prefix of the whole model."""
    named: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        kind, own = split_kind(name)
        own = _WRAPPERS.sub("", own)
        if not BUFFERS.fullmatch(own):
            named[f"{kind}.{own}" if kind else own] = tensor
    if "encoder.weight" in named and EMBEDDING not in named:
        named = {name if name.startswith("decoder.") else f"model.{name}": t for name, t in named.items()}
    if named and all(split_kind(name)[1] != EMBEDDING for name in named):
        examples = ", ".join(shown(n) for n in list(named)[:3])
        raise UsageError(f"There is no {EMBEDDING} among the tensors ({examples}, …): not a NeoBERT.")
    return named


def _same(a: Stored, b: Stored) -> bool:
    return a.spec == b.spec and torch.equal(a.read(), b.read())


def _split(tensors: dict[str, Stored]) -> dict[str, Stored]:
    """Cut each `w12` into w1, its upper half, and w2."""
    cut: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        if not name.endswith(".ffn.w12.weight"):
            cut[name] = tensor
            continue
        half, width = tensor.spec.shape[0] // 2, tensor.spec.shape[1]
        for part, place in (("w1", slice(0, half)), ("w2", slice(half, None))):
            cut[name.replace("w12", part)] = Derived((half, width), partial(_rows, tensor, place))
    return cut


def _rows(tensor: Stored, place: slice) -> Tensor:
    return tensor.read()[place]


# --- numbered parameters ---------------------------------------------------------------------------------------------


def _named(source: Source, weights: dict[str, Stored], parameters: dict[str, Parameter]) -> dict[str, Stored]:
    """Give numbered moments their names: parameters with weight decay in the model's order, then the others."""
    order = []
    for name in parameters:
        packed = re.sub(r"\.ffn\.w1\.", ".ffn.w12.", name)
        if packed in weights:
            order.append(packed)
        elif re.sub(r"\.ffn\.w2\.", ".ffn.w12.", name) not in weights or ".ffn.w2." not in name:
            order.append(name)
    order.sort(key=lambda name: not parameters[name.replace(".w12.", ".w1.")].decays())
    named = {}
    for number, name in enumerate(order):
        for kind in ADAM.kinds:
            moment = source.moments.get(f"{kind}.#{number}")
            if moment is None or moment.spec.shape != weights[name].spec.shape:
                raise _other_order(source.path, number, name)
            named[f"{kind}.{name}"] = moment
    if len(named) != len(source.moments):
        raise _other_order(source.path, len(order), "no parameter")
    return named


def _other_order(path: Path, number: int, name: str) -> UsageError:
    return UsageError(
        f"{path}: parameter {number} of the optimizer should be {name}, but is not. It was made by an optimizer other "
        "than NeoBERT's AdamW, whose state cannot be carried over; import the weights alone, from model.safetensors."
    )
