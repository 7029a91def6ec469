"""Layers that the encoders share. Everything runs on flat tokens: documents one after the other, no batch axis.

Shapes: T tokens, E hidden size, H heads, D head dim (E = H D), F feed-forward size, N documents.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from enc.kernels.norms import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from enc.kernels.swiglu import swiglu
from enc.kernels.varlen_attention import varlen_attention


class RMSNorm(nn.Module):
    """RMSNorm with a weight and no bias, (..., E)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, branch: Tensor | None = None, dtype: torch.dtype | None = None) -> Any:
        """Return the norm of x in this dtype; with a branch the pair (x + branch, its norm)."""
        if branch is None:
            return rms_norm(x, self.weight, self.eps, dtype)
        return add_rms_norm(x, branch, self.weight, self.eps, dtype)


class LayerNorm(nn.LayerNorm):
    """LayerNorm with weight and bias, (..., E); called as ``RMSNorm`` is."""

    def forward(self, x: Tensor, branch: Tensor | None = None, dtype: torch.dtype | None = None) -> Any:
        if branch is None:
            return layer_norm(x, self.weight, self.bias, self.eps, dtype)
        return add_layer_norm(x, branch, self.weight, self.bias, self.eps, dtype)


class SwiGLU(nn.Module):
    """``w3(silu(w1 x) * w2 x)`` without biases, (T, E) to (T, E)."""

    def __init__(self, size: int, hidden_size: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(size, hidden_size, bias=False)
        self.w2 = nn.Linear(size, hidden_size, bias=False)
        self.w3 = nn.Linear(hidden_size, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(swiglu(self.w1(x), self.w2(x)))


def attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, dropout_p: float, scale: float | None = None) -> Tensor:
    """Attend within each document, (T, H, D) each, and join the heads to (T, E)."""
    return varlen_attention(q, k, v, cu_seqlens, dropout_p, scale).flatten(1)


# What selective recomputation keeps: the operations that cost most, a small part of what a block keeps otherwise.
_KEPT = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.enc.varlen_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
]


def recomputed(block: nn.Module, *inputs: Any, selective: bool) -> Tensor:
    """Run a block that is computed again in the backward pass instead of keeping its activations.

    With ``selective`` the results of matrix products and attention are kept (torch's selective checkpointing).
    """
    contexts: dict[str, Any] = {"context_fn": partial(create_selective_checkpoint_contexts, _KEPT)} if selective else {}
    return checkpoint(block, *inputs, use_reentrant=False, **contexts)


def matmul_dtype(x: Tensor) -> torch.dtype | None:
    """Return the autocast dtype where autocast is on: cast to it once, and not again in each matmul that reads x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
