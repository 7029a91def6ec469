"""The config sections `optimizer` and `scheduler`."""

from typing import Annotated, Literal

from pydantic import Field

from enc.encoder.section import (
    Beta,
    Bool,
    Count,
    Fraction,
    NonNegativeFloat,
    Percent,
    PositiveFloat,
    PositiveInt,
    Section,
)


class OptimizerConfig(Section):
    """The optimizer. Norms and biases have no weight decay, and embeddings only if asked."""

    name: Literal["adamw", "adam"] = "adamw"
    """`adamw`, or `adam` whose weight decay is L2 on all parameters."""
    lr: PositiveFloat = 1e-4
    """Peak learning rate."""
    weight_decay: NonNegativeFloat = 0.01
    """Weight decay."""
    decay_embeddings: Bool = False
    """Decay embeddings (so a tied head), learned positions and the relative bias too, as annotated-mpnet does."""
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.999)
    """Decay rates of the two moments."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator."""


class SchedulerConfig(Section):
    """Learning rate over the steps: linear warmup from 1e-4 of the peak, then the named shape, then its last value."""

    name: Literal["cosine", "linear", "polynomial", "polynomial_decay", "constant", "warmup_stable_decay"] = "cosine"
    """Shape after the warmup. `polynomial_decay` is fairseq's and annotated-mpnet's: update n of a warmup of W has
    n / W of the peak, and the last update has the end value."""
    warmup_steps: Count = 10000
    """Length of the warmup, in steps."""
    warmup_percent: Percent | None = None
    """Length of the warmup in percent of the total; wins over `warmup_steps`."""
    total_steps: PositiveInt | None = None
    """Steps that percentages and default ends refer to; `trainer.max_steps` by default."""
    decay_steps: PositiveInt | None = None
    """Step at which the decay ends (the total by default); with `warmup_stable_decay` the length of the last decay."""
    decay_percent: Percent | None = None
    """The same in percent of the total; wins over `decay_steps`. By default `warmup_stable_decay` uses 10."""
    final_lr_ratio: Fraction = 0.1
    """Last learning rate as a share of the peak."""
    power: PositiveFloat = 1.0
    """Exponent of `polynomial` and `polynomial_decay`."""
