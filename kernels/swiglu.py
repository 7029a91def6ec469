"""The gate of SwiGLU (arXiv 2002.05202): silu(a) b, with silu(a) = a s and s = 1 / (1 + exp(-a)).

For g = dL/dh of h = silu(a) b::

    da = g b s (1 + a (1 - s))        db = g silu(a)

The fused kernels compute in fp32, round once, keep a and b alone and compute s again in the backward pass. On the CPU
the plain operations stay: an own backward pass that computes s again takes 13.1 ms for 4096 x 1024 bf16 and 16.8 for
fp32, PyTorch's 8.2 and 11.2; one that keeps silu(a) as PyTorch does is no faster than it (7.5 and 14.0), and neither
gains from blocks that stay in the cache.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from enc.kernels import dispatch


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    """Return ``silu(a) * b`` for a and b of one shape and dtype."""
    if torch.compiler.is_compiling() or why_not(a.device.type, a.dtype):
        return reference(a, b)  # inductor fuses it
    return _SwiGLUFunction.apply(a, b)  # type: ignore[no-untyped-call, no-any-return]


def why_not(device: str, dtype: torch.dtype) -> str | None:
    """Say why no fused kernel computes the gate on this device; None if one does."""
    return dispatch.why_not_triton(device, dtype)


def reference(a: Tensor, b: Tensor) -> Tensor:
    """Compute the same with two operations of PyTorch."""
    return F.silu(a) * b


class _SwiGLUFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        from enc.kernels import swiglu_triton

        ctx.save_for_backward(a, b)
        return swiglu_triton.forward(a, b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        from enc.kernels import swiglu_triton

        return swiglu_triton.backward(grad, *ctx.saved_tensors)
