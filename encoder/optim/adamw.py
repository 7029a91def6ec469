"""AdamW over two groups of parameters, with and without weight decay, and Adam over one."""

from typing import Any

import torch
from torch import nn

from enc.encoder.optim.config import OptimizerConfig


def decays(name: str, parameter: nn.Parameter, embeddings: bool = False) -> bool:
    """Tell whether a parameter has weight decay: matrices do, norms and biases do not.

    Of `embeddings` (so a tied head too), learned positions and the relative bias it is asked.
    """
    matrix = parameter.ndim >= 2 and not name.endswith(".bias") and "norm" not in name
    return matrix and (embeddings or name not in _EMBEDDINGS)


_EMBEDDINGS = frozenset({
    "model.encoder.weight",
    "model.positional_embedding.weight",
    "mpnet.embeddings.word_embeddings.weight",
    "mpnet.embeddings.position_embeddings.weight",
    "mpnet.encoder.relative_attention_bias.weight",
})  # fmt: skip


def adamw(config: OptimizerConfig, named_parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    """Build AdamW with a group for parameters that decay and one for the others."""
    decayed = {name for name, p in named_parameters.items() if decays(name, p, config.decay_embeddings)}
    with_decay = [p for name, p in named_parameters.items() if name in decayed]
    without = [p for name, p in named_parameters.items() if name not in decayed]
    groups = [{"params": with_decay, "weight_decay": config.weight_decay}, {"params": without, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], **_settings(config))


def adam(config: OptimizerConfig, named_parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    """Build Adam, which applies its decay as L2 to every parameter."""
    return torch.optim.Adam(named_parameters.values(), weight_decay=config.weight_decay, **_settings(config))


def _settings(config: OptimizerConfig) -> dict[str, Any]:
    return {"lr": config.lr, "betas": config.betas, "eps": config.eps, "fused": True}
