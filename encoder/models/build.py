"""A model with its first weights, from its config section."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from enc.encoder.keyed import torch_rng
from enc.encoder.models.architecture import Init, Parameter
from enc.encoder.models.config import ModelConfig
from enc.encoder.models.registry import architecture_of


class MaskedLanguageModel(Protocol):
    """What objectives, engines and exports ask of a model; it is an `nn.Module` too.

    Shapes: X token positions, M of them that are wanted, E hidden size, V rows of the vocabulary.
    """

    num_tokens: int
    softcap: float | None

    @property
    def head_weight(self) -> Tensor:
        """The head's matrix (V, E), the embedding itself when tied."""

    @property
    def head_bias(self) -> Tensor | None:
        """The head's bias (V,)."""

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks, in order: what engines shard and torch.compile compiles one by one."""

    def recompute(self, what: Literal["full", "selective"] | None, every: int = 1) -> None:
        """Compute every so many-th block again in the backward pass."""

    def transform(self, hidden: Tensor) -> Tensor:
        """Return what the head's matrix reads, of hidden states (M, E)."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the scores of every row of the vocabulary, (M, V)."""

    __call__: Callable[..., Tensor]


def build_model(config: ModelConfig, num_tokens: int) -> nn.Module:
    """Return the model for a tokenizer of `num_tokens` tokens; its weights are whatever PyTorch gives them."""
    module, _, name = architecture_of(config).model.partition(":")
    model: nn.Module = getattr(import_module(module), name)(config, num_tokens)
    return model


@torch.no_grad()
def init_weights(model: nn.Module, known: Mapping[str, Parameter], seed: int) -> None:
    """Fill every parameter from its own name and the seed, so that neither order nor sharding matters.

    Raises ValueError for a parameter of which nothing is known: no rule says how it starts.
    """
    for name, parameter in model.named_parameters():
        if name not in known:
            raise ValueError(f"{name} {tuple(parameter.shape)} has no rule for its first values")
        _fill(parameter, known[name].init, torch_rng(seed, "init", name))


def _fill(parameter: Tensor, init: Init, generator: torch.Generator) -> None:
    match init.kind:
        case "uniform":
            draw = torch.empty(parameter.shape).uniform_(-init.value, init.value, generator=generator)
            parameter.copy_(draw)
        case "normal":
            parameter.copy_(torch.empty(parameter.shape).normal_(generator=generator) * init.value)
        case "constant":
            parameter.fill_(init.value)
    if init.zero_row is not None:
        parameter[init.zero_row].zero_()
