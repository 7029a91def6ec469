"""Small MPNets with random weights, and tokenizers for them."""

from pathlib import Path

import torch
from places import GOLDEN
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from enc.encoder.models.build import init_weights
from enc.encoder.models.mpnet.config import MpnetConfig
from enc.encoder.models.mpnet.model import MpnetForMaskedLM
from enc.encoder.models.registry import parameters_of

ANNOTATED = GOLDEN / "annotated-mpnet"
NUM_TOKENS = 700
FIELDS = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64,
          "max_position_embeddings": 200}  # fmt: skip
PRE_NORM = {"normalize_before": True}
BUCKETS = {"relative_attention_num_buckets": 24, "relative_attention_max_distance": 60}


def tiny_mpnet(seed: int = 0, **changes) -> tuple[MpnetForMaskedLM, MpnetConfig]:
    """Return a model whose biases, norms and relative bias are far from their first values, and its config."""
    config = MpnetConfig(**{**FIELDS, "vocab_size": 768, "initializer_range": 0.2, **changes})
    model = MpnetForMaskedLM(config, NUM_TOKENS)
    init_weights(model, parameters_of(config), seed)
    disturb(model, seed, 0.2)
    return model.eval(), config


@torch.no_grad()
def disturb(model: MpnetForMaskedLM, seed: int, deviation: float) -> None:
    """Move biases and norms away from their first values, and draw the relative bias anew."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.empty(parameter.shape).normal_(0, deviation, generator=generator))
    model.mpnet.encoder.relative_attention_bias.weight.normal_(generator=generator)


@torch.no_grad()
def flat(model: MpnetForMaskedLM, documents: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return hidden states and logits of packed documents, their rows one after the other."""
    bounds = torch.tensor([0, *map(len, documents)]).cumsum(0).to(torch.int32)
    hidden = model(torch.cat(documents), bounds, torch.cat([torch.arange(len(ids)) for ids in documents]))
    return hidden, model.logits(hidden)[:, :NUM_TOKENS]


def texts(lengths: list[int], first_id: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(first_id, NUM_TOKENS, (n,), generator=generator) for n in lengths]


def padded(documents: list[Tensor], pad_id: int, side: str = "right") -> tuple[Tensor, Tensor]:
    """Return ids and attention mask of a padded batch."""
    longest = max(map(len, documents))
    ids = torch.full((len(documents), longest), pad_id)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(documents):
        place = slice(0, len(text)) if side == "right" else slice(longest - len(text), longest)
        ids[row, place], mask[row, place] = text, 1
    return ids, mask


def padding_first(folder: Path) -> Path:
    """Write a tokenizer whose padding has id 0, as BERT's."""
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[MASK]": 2} | {f"w{i}": i for i in range(3, NUM_TOKENS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", mask_token="[MASK]")
    fast.save_pretrained(folder)
    return folder
