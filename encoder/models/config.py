"""The config section `model`: what all architectures have."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from enc.encoder.section import Count, NoEffect, PositiveFloat, PositiveInt, Section


def _attention_name(value: Any) -> Any:
    return "flash_attn_varlen" if value in ("flash", "flash_attn") else value


def _kernels_name(value: Any) -> Any:
    return "fused" if value == "liger" else value


class ModelConfig(Section):
    """What all architectures have."""

    type: Literal["neobert", "mpnet"] = "neobert"
    """Architecture; it decides which other keys this section has."""
    name: Annotated[str | None, NoEffect("it is a label only")] = None
    """Label of the architecture."""
    hidden_size: PositiveInt = 768
    """Width of the residual stream."""
    num_hidden_layers: PositiveInt = 12
    """Number of transformer blocks."""
    num_attention_heads: PositiveInt = 12
    """Number of attention heads; must divide `hidden_size`."""
    intermediate_size: PositiveInt = 3072
    """Feed-forward width; before the SwiGLU rule: `swiglu` makes it 2/3 of this, rounded up to a multiple of 8."""
    max_position_embeddings: PositiveInt = 512
    """Longest document piece, in tokens, that the model has positions for."""
    vocab_size: PositiveInt = 30522
    """Rows of the embedding. Taken from the tokenizer when a run starts, padded to a multiple of 128 with inert ids."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon of the norms."""
    attn_backend: Annotated[Literal["auto", "sdpa", "flash_attn_varlen"], BeforeValidator(_attention_name)] = "auto"
    """Attention kernels: the best there are, PyTorch's own only, or no start without fused ones."""
    kernel_backend: Annotated[Literal["auto", "torch", "fused"], BeforeValidator(_kernels_name)] = "auto"
    """Other kernels: fused ones on GPUs, PyTorch's own only, or no start without fused ones. `liger` means `fused`."""
    pad_token_id: Count = 0
    """Taken from the tokenizer when a run starts."""
