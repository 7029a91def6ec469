"""The optimizer that the config names. What it keeps is said in `enc.encoder.optim.state_spec`."""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from enc.encoder.models.architecture import Parameter
from enc.encoder.optim.adamw import adam, adamw
from enc.encoder.optim.config import OptimizerConfig

Trained = list[tuple[nn.Parameter, Parameter]]
"""Each parameter that is trained, or what a rank has of it, and what is known of the whole."""

_MAKERS: dict[str, Callable[[OptimizerConfig, Trained], torch.optim.Optimizer]] = {"adamw": adamw, "adam": adam}


def make_optimizer(
    optimizer: OptimizerConfig, known: Mapping[str, Parameter], named_parameters: dict[str, nn.Parameter]
) -> torch.optim.Optimizer:
    """Build the optimizer of a config section for parameters by name, of which this is known."""
    return _MAKERS[optimizer.name](optimizer, [(p, known[name]) for name, p in named_parameters.items()])
