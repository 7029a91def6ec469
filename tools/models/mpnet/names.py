"""Tensors of an MPNet of annotated-mpnet (or fairseq), or of Hugging Face, under the names and shapes of the one here.

annotated-mpnet keeps the projections of queries, keys and values in one tensor, and its position table has a row for
each id up to that of padding before the first position; here the first position is row 2, as in transformers.
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
from enc.encoder.models.mpnet import pretrained
from enc.encoder.models.mpnet.architecture import MPNET, POSITION_OFFSET
from enc.encoder.models.mpnet.config import MpnetConfig
from enc.encoder.models.vocabulary import padded_vocab_size
from enc.encoder.optim.config import OptimizerConfig
from enc.encoder.optim.state_spec import ADAM, state_spec
from enc.encoder.printable import shown
from enc.tools.models.fitting import Derived, Fit, ModelState, unused_rows
from enc.tools.readers.annotated import FORMAT as ANNOTATED
from enc.tools.readers.source import Source, Stored

EMBEDDING, HEAD_BIAS = "mpnet.embeddings.word_embeddings.weight", "lm_head.bias"
POSITIONS = "mpnet.embeddings.position_embeddings.weight"
_PLACES = {
    "sentence_encoder.embed_tokens": "mpnet.embeddings.word_embeddings",
    "sentence_encoder.embed_positions": "mpnet.embeddings.position_embeddings",
    "sentence_encoder.emb_layer_norm": "mpnet.embeddings.LayerNorm",
    "sentence_encoder.relative_attention_bias": "mpnet.encoder.relative_attention_bias",
    "sentence_encoder.final_layer_norm": "mpnet.encoder.LayerNorm",
    "lm_head.dense": "lm_head.dense",
    "lm_head.layer_norm": "lm_head.layer_norm",
    "lm_head": "lm_head",
}
_IN_LAYER = {
    "self_attn.out_proj": "attention.attn.o",
    "self_attn_layer_norm": "attention.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "final_layer_norm": "output.LayerNorm",
}
_LAYER = re.compile(r"sentence_encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_IN_PROJ = re.compile(r"sentence_encoder\.layers\.(\d+)\.self_attn\.in_proj_(weight|bias)")


def own_names(name: str) -> list[str]:
    """Return the names here of a tensor of annotated-mpnet, three of in_proj (its thirds); none if it has no place.

    The head's matrix is the embedding, so `lm_head.weight` has no name of its own.
    """
    if name == "lm_head.weight":
        return []
    if found := _IN_PROJ.fullmatch(name):
        return [f"mpnet.encoder.layer.{found[1]}.attention.attn.{part}.{found[2]}" for part in "qkv"]
    if (found := _LAYER.fullmatch(name)) and found[2] in _IN_LAYER:
        return [f"mpnet.encoder.layer.{found[1]}.{_IN_LAYER[found[2]]}.{found[3]}"]
    place, _, kind = name.rpartition(".")
    return [f"{_PLACES[place]}.{kind}"] if place in _PLACES else []


def own_tensors(name: str, tensor: Tensor, pad_id: int) -> dict[str, Tensor]:
    """Return what a tensor of annotated-mpnet (a weight, its gradient or a moment) is here, by name."""
    names = own_names(name)
    if names == [POSITIONS]:
        unread = torch.zeros(POSITION_OFFSET, *tensor.shape[1:], dtype=tensor.dtype)
        return {POSITIONS: torch.cat([unread, tensor[pad_id + 1 :]])}
    return dict(zip(names, tensor.chunk(len(names)), strict=True)) if names else {}


def hub_keys(found: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return the keys of a run config that the content of an MPNet's config.json gives. Raises as `mpnet_keys`."""
    keys = {f"model.{name}": value for name, value in pretrained.mpnet_keys(found, file).items()}
    longest = min(keys["model.max_position_embeddings"], DatasetConfig().max_seq_length)
    return {"model.type": "mpnet", **keys, "dataset.max_seq_length": longest}


# --- a checkpoint as a whole -----------------------------------------------------------------------------------------


def mpnet_state(
    source: Source, model: MpnetConfig, tokenizer: EncoderTokenizer, optimizer: OptimizerConfig
) -> ModelState:
    """Return the tensors of an MPNet source for its tokenizer and an optimizer.

    Raises UsageError when the tensors do not fit the model section or the tokenizer.
    """
    _check_tokenizer(source, tokenizer)
    model = model.model_copy(update={"vocab_size": padded_vocab_size(tokenizer.num_tokens)})
    moments: dict[str, Stored] = {}
    if any(name.startswith("sentence_encoder.") for name in source.weights):
        weights = _renamed(source.weights, tokenizer.pad_id, source.path)
        for kind, of_kind in _named(source).items():
            renamed = _renamed(of_kind, tokenizer.pad_id, source.path)
            moments |= {f"{kind}.{name}": tensor for name, tensor in renamed.items()}
    else:
        weights = {own: tensor for name, tensor in source.weights.items() if (own := pretrained.own_name(name))}
        for moment, tensor in source.moments.items():
            kind, name = moment.split(".", 1)
            if not name.startswith("#") and (own := pretrained.own_name(name)):
                moments[f"{kind}.{own}"] = tensor
        if HEAD_BIAS not in weights:
            raise UsageError(
                f"{source.path} has no language-model head, so it is no checkpoint to go on with. Start a run from it: "
                "`enc launch pretrain ... model.init_from=FOLDER`."
            )
    if EMBEDDING not in weights:
        raise UsageError(f"There is no embedding of an MPNet among the tensors of {source.path}: not an MPNet.")
    fit = Fit(MPNET.shapes(model), (EMBEDDING, HEAD_BIAS), unused_rows(weights, moments, EMBEDDING), source.path)
    fitted_moments = fit.fitted_moments(moments, state_spec(optimizer, MPNET.parameters(model)))
    return ModelState(model, fit.fitted(weights), fitted_moments)


def _check_tokenizer(source: Source, tokenizer: EncoderTokenizer) -> None:
    """Raise UsageError unless the tokenizer has the size and the padding that a checkpoint's args tell."""
    args = source.config or {}
    for key, ours in (("original_vocab_size", tokenizer.num_tokens), ("pad_token_id", tokenizer.pad_id)):
        theirs = args.get(key)
        if source.format == ANNOTATED and theirs is not None and theirs != ours:
            raise UsageError(
                f"{source.path} was trained with a tokenizer of {key} {theirs}, the one given has {ours}. Name the "
                "folder of the right one: --tokenizer DIR."
            )


def _renamed(tensors: dict[str, Stored], pad_id: int, path: Path) -> dict[str, Stored]:
    renamed: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        names = own_names(name)
        if not names and name != "lm_head.weight":
            raise UsageError(
                f"{path} holds {shown(name)}, for which an MPNet here has no place. It cannot be imported."
            )
        for number, own in enumerate(names):
            shape = _own_shape(own, tensor.spec.shape, len(names), pad_id)
            renamed[own] = Derived(shape, partial(_own_part, name, tensor, pad_id, number))
    return renamed


def _own_shape(own: str, shape: tuple[int, ...], num_parts: int, pad_id: int) -> tuple[int, ...]:
    if not shape:
        raise UsageError(f"The checkpoint holds a single number for {own}. Copy it again.")
    rows = shape[0] // num_parts
    return (rows - pad_id - 1 + POSITION_OFFSET if own == POSITIONS else rows, *shape[1:])


def _own_part(name: str, tensor: Stored, pad_id: int, number: int) -> Tensor:
    return list(own_tensors(name, tensor.read(), pad_id).values())[number]


def _named(source: Source) -> dict[str, dict[str, Stored]]:
    """Give numbered moments their names, by kind: matrices and tables first, then vectors, each as the model has them.

    annotated-mpnet leaves biases and vectors without weight decay, a group of its own behind the others. The head's
    matrix is the embedding and has no number.
    """
    if not source.moments:
        return {}
    parameters = [name for name in source.weights if name != "lm_head.weight"]
    order = sorted(parameters, key=lambda name: name.endswith(".bias") or len(source.weights[name].spec.shape) == 1)
    named: dict[str, dict[str, Stored]] = {kind: {} for kind in ADAM.kinds}
    for number, name in enumerate(order):
        for kind in ADAM.kinds:
            moment = source.moments.get(f"{kind}.#{number}")
            if moment is None or moment.spec.shape != source.weights[name].spec.shape:
                raise _other_order(source.path, number, name)
            named[kind][name] = moment
    if len(ADAM.kinds) * len(order) != len(source.moments):
        raise _other_order(source.path, len(order), "no parameter")
    return named


def _other_order(path: Path, number: int, name: str) -> UsageError:
    return UsageError(
        f"{path}: parameter {number} of its optimizer should be {name}, but is not. It was made by an optimizer other "
        "than annotated-mpnet's AdamW; move its file out of optimizer/ to import the weights alone."
    )
