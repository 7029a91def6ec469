"""What is known of a model without building it: one record a model. No torch.

Whoever has to know which model a run has goes by the record that `models.registry.architecture_of` gives for its config
section; only the folder of a model looks into the section itself.

Legend: E hidden size, F feed-forward width, H heads, D head dim, V vocabulary rows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, NamedTuple

from enc.encoder.models.config import ModelConfig

Shape = tuple[int, ...]
Role = Literal["matrix", "head", "embedding", "norm", "bias", "scale"]
Rule = tuple[tuple[str, ...], str]
"""A broken rule: the keys that it spans, and what is wrong and what to do."""


@dataclass(frozen=True)
class Init:
    """First values of a parameter: `uniform` in +- value, `normal` with deviation value, or `constant`."""

    kind: Literal["uniform", "normal", "constant"]
    value: float
    zero_row: int | None = None
    """A row that starts at zero: an embedding that no text reads, such as that of padding."""


@dataclass(frozen=True)
class Matrix:
    """One matrix of a parameter, which may hold several: ``weight.view(view)[index]``, all but the last axis made one.

    `index` has an entry for each leading axis of the view: a number, or None for the whole axis.
    """

    part: str
    view: Shape
    index: tuple[int | None, ...] = ()

    def of(self, weight: Any) -> Any:
        """Return the matrix as a view of a whole parameter, a tensor or an array."""
        place = tuple(slice(None) if number is None else number for number in self.index)
        picked = weight.reshape(self.view)[place]
        return picked.reshape(-1, self.view[-1])


@dataclass(frozen=True)
class Parameter:
    """One trained tensor: what optimizers, engines and checkpoints go by."""

    shape: Shape
    role: Role
    """Weight decay goes by it: `matrix` and `head` have it, `embedding` if asked (learned positions and tables of
    relative positions too), the others never."""
    init: Init
    matrices: tuple[Matrix, ...] = ()
    """What of it is one matrix each, for optimizers of matrices; those of a block's products only."""

    @property
    def size(self) -> int:
        return prod(self.shape)

    def decays(self, embeddings: bool = False) -> bool:
        """Tell whether weight decay reaches it; `embeddings` says whether that of embeddings is asked for."""
        return self.role in ("matrix", "head") or (embeddings and self.role == "embedding")


class Activations(NamedTuple):
    """What a block keeps for the backward pass, in elements a token: (fp32 ones, ones of the matmuls' dtype)."""

    all: tuple[int, int]
    """Of every token: the block's input, and what keys and values need."""
    computed: tuple[int, int]
    """Of tokens whose output is computed, which are the labelled ones in the last block."""
    products: int
    """Those among both that matrix products and attention gave."""


@dataclass(frozen=True)
class Architecture:
    """What differs from model to model. Each function takes the model's own config section."""

    name: str
    """The value of `model.type`."""
    title: str
    """What people call it."""
    config: type[ModelConfig]
    parameters: Callable[[Any], dict[str, Parameter]]
    """Every trained parameter under its name in the model; a tied head has none of its own."""
    block_parameters: Callable[[Any], tuple[int, int]]
    """Matrix parameters of one block: those that work on a token, and all of them."""
    feed_forward_width: Callable[[Any], int]
    """F."""
    activations: Callable[[Any], Activations]
    """What a block keeps for the backward pass, dropout's draws left out."""
    head_parameters: Callable[[Any], int]
    """Matrix parameters that work on a predicted token after the last block."""
    attention: Callable[[Any], tuple[bool, bool]]
    """Whether attention has a bias, and whether it has dropout in training: kernels are chosen by it."""
    rules: Callable[[Any], Iterator[Rule]]
    """Rules that span keys of the section."""
    objectives: tuple[str, ...]
    """What it can be trained for; the first is `objective: auto`."""
    model: str
    """Module with the class of the model, and the class: `module:Class`; imported when a model is built."""
    init_from: Callable[[Any], str | None] = lambda _config: None
    """The folder of published weights that a section names for a run to start from."""
    pretrained: str | None = None
    """Module that starts a model from such a folder, as `enc.encoder.models.first_weights` tells."""
    pad_id: int = 0
    """Where a tokenizer that is trained for it has its padding token."""
    hub_types: tuple[str, ...] = ()
    """The `model_type` of its exports in a `config.json`."""

    def shapes(self, config: Any) -> dict[str, Shape]:
        """Return the shape of every trained parameter under its name in the model."""
        return {name: parameter.shape for name, parameter in self.parameters(config).items()}


def rounded_up(number: int, multiple: int) -> int:
    """Return the next multiple."""
    return -(-number // multiple) * multiple
