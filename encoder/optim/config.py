"""The config sections `optimizer` and `scheduler`."""

from typing import Annotated, Any, Literal

from pydantic import Field

from enc.encoder.section import (
    Beta,
    Bool,
    Count,
    Fraction,
    NonNegativeFloat,
    NotBuilt,
    Percent,
    PositiveFloat,
    PositiveInt,
    Section,
)


class MuonConfig(Section):
    """Settings of the MuonClip optimizer."""

    muon_beta: Beta = 0.95
    """Momentum."""
    muon_decay: NonNegativeFloat = 0.0
    """Weight decay of matrices."""
    ns_steps: Annotated[int, Field(ge=1, le=20)] = 5
    """Orthogonalisation steps."""
    enable_clipping: Bool = True
    """Clip attention logits."""
    clipping_threshold: PositiveFloat = 50.0
    """Largest attention logit."""
    clipping_alpha: Fraction = 0.5
    """Share of the correction that goes to the query."""
    clipping_warmup_steps: Count = 0
    """Steps before clipping starts."""
    clipping_interval: PositiveInt = 10
    """Steps between clippings."""
    clipping_qk_chunk_size: PositiveInt = 1024
    """Tokens a tile of the logit computation."""
    capture_last_microbatch_only: Bool = True
    """Look at one microbatch a step."""
    detect_anomalies: Bool = False
    """Check for non-finite values."""
    orthogonalization: Literal["polar_express", "newton_schulz"] = "polar_express"
    """Orthogonalisation method."""
    norm_factor: Literal["spectral", "match_rms_adamw", "none", "legacy_compat"] = "spectral"
    """Scale of the update."""
    algorithm: str | None = None
    """Old name of `orthogonalization`."""
    polar_express: bool | None = None
    """Old switch of `orthogonalization`."""
    clipping_layers_mapping: dict[str, Any] = {}
    """Names of the layers to clip."""


class OptimizerConfig(Section):
    """The optimizer. Norms and biases have no weight decay, and embeddings only if asked."""

    name: Literal["adamw", "adam", "muonclip"] = "adamw"
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
    muon_config: Annotated[MuonConfig | None, NotBuilt("MuonClip")] = None
    """Settings of MuonClip."""


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
