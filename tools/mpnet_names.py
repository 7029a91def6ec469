"""Names of MPNet's parameters in annotated-mpnet (and fairseq), and what they are here.

annotated-mpnet keeps the projections of queries, keys and values in one tensor, and its position table has a row for
each id up to that of padding before the first position; here the first position is row 2, as in transformers.
"""

import re

import torch
from torch import Tensor

from enc.encoder.models.mpnet import POSITION_OFFSET

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
