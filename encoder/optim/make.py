"""The optimizer that the config names. What it keeps is said in `enc.encoder.optim.state_spec`."""

from collections.abc import Callable

import torch
from torch import nn

from enc.encoder.optim.adamw import adam, adamw
from enc.encoder.optim.config import OptimizerConfig

_MAKERS: dict[str, Callable[[OptimizerConfig, dict[str, nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": adamw,
    "adam": adam,
}


def make_optimizer(config: OptimizerConfig, named_parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    """Build the optimizer of a config section for parameters by name."""
    return _MAKERS[config.name](config, named_parameters)
