"""AdamW over two groups of parameters, with and without weight decay, and Adam over one."""

from typing import Any

import torch
from torch import nn

from enc.encoder.models.architecture import Parameter
from enc.encoder.optim.config import OptimizerConfig


def adamw(config: OptimizerConfig, trained: list[tuple[nn.Parameter, Parameter]]) -> torch.optim.Optimizer:
    """Build AdamW with a group for parameters that decay and one for the others."""
    with_decay = [p for p, known in trained if known.decays(config.decay_embeddings)]
    without = [p for p, known in trained if not known.decays(config.decay_embeddings)]
    groups = [{"params": with_decay, "weight_decay": config.weight_decay}, {"params": without, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], **_settings(config))


def adam(config: OptimizerConfig, trained: list[tuple[nn.Parameter, Parameter]]) -> torch.optim.Optimizer:
    """Build Adam, which applies its decay as L2 to every parameter."""
    return torch.optim.Adam([p for p, _ in trained], weight_decay=config.weight_decay, **_settings(config))


def _settings(config: OptimizerConfig) -> dict[str, Any]:
    return {"lr": config.lr, "betas": config.betas, "eps": config.eps, "fused": True}
