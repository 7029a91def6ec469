"""Which kernels a run uses on its device, and why no faster ones."""

import torch

from enc.encoder.errors import UsageError
from enc.encoder.models.config import ModelConfig
from enc.encoder.models.registry import architecture_of
from enc.kernels import dispatch, masked_ce, norms, varlen_attention


def allow_kernels(model: ModelConfig, device: str, dtype: torch.dtype) -> None:
    """Let this process use the kernels that the config names, on a `cpu` or `cuda` device in the dtype of the matmuls.

    Raises UsageError when the config insists on fused kernels and there are none.
    """
    dispatch.allowed.flash_attn = model.attn_backend != "sdpa"
    dispatch.allowed.triton = model.kernel_backend != "torch"
    missing = {}
    if model.attn_backend == "flash_attn_varlen":
        missing["attn_backend: flash_attn_varlen"] = attention(model, device, dtype)[1]
    if model.kernel_backend == "fused":
        missing["kernel_backend: fused"] = dispatch.why_not_triton(device, dtype)
    for key, why_not in missing.items():
        if why_not:
            raise UsageError(
                f"The config asks for model.{key}, but {why_not}. With `auto` it trains with what there is."
            )


def attention(model: ModelConfig, device: str, dtype: torch.dtype) -> tuple[str, str | None]:
    """Return what computes attention, and why it is no fused kernel, None if it is one."""
    asked = device, dtype, model.hidden_size // model.num_attention_heads
    bias, dropout = architecture_of(model).attention(model)
    return (
        varlen_attention.backend(*asked, bias=bias, dropout=dropout),
        varlen_attention.why_not(*asked, bias=bias, dropout=dropout),
    )


def why_not(model: ModelConfig, device: str, dtype: torch.dtype) -> dict[str, str | None]:
    """Return for each part of a model why no fused kernel computes it, None where one does."""
    return {
        "attention": attention(model, device, dtype)[1],
        "norms, gate, rotation": norms.why_not(device, dtype, model.hidden_size),
        "loss": masked_ce.why_not(device, dtype),
    }


def describe(model: ModelConfig, device: str, dtype: torch.dtype) -> list[tuple[str, str]]:
    """Return what computes each part of a model, in words."""
    cuda, reasons = device == "cuda", why_not(model, device, dtype)
    runs = {
        "attention": attention(model, device, dtype)[0],
        "norms, gate, rotation": "PyTorch's operations" if reasons["norms, gate, rotation"] else "fused",
        "loss": "fused" if cuda and reasons["loss"] is None else "in chunks of the vocabulary",
    }
    return [(part, f"{text}; {reasons[part]}" if reasons[part] else text) for part, text in runs.items()]
