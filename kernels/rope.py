"""Rotary position embedding, adjacent pairs (RoFormer, arXiv 2104.09864, eq. 34).

Pair i of a head, (x_{2i}, x_{2i+1}), is the complex number x_{2i} + 1j x_{2i+1}; a token at position p turns it by the
angle p * theta^(-2i / D). The turn is computed in fp32 whatever the dtype of x. On the CPU one complex product is 4-6
times faster than real cosines and sines (1.0 against 5.9 ms for 4096 x 24 x 32 fp32); only the real form is fused by
inductor.

Shapes: T tokens, D head dim.
"""

import torch
from torch import Tensor

_BLOCK_NUMBERS = 2**16


def rotations(position_ids: Tensor, head_dim: int, theta: float = 10000.0) -> Tensor:
    """Return cosine and sine of every pair's angle, (T, D / 2, 2) fp32, for positions (T,)."""
    pairs = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32)
    angles = position_ids[:, None].float() * theta ** (-pairs / head_dim)  # (T, D / 2)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def rope(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate x (T, ..., D) by ``rotations`` (T, D / 2, 2); returns the dtype of x. D must be even."""
    turns = turns.view(len(turns), *[1] * (x.dim() - 2), *turns.shape[1:])  # (T, 1.., D / 2, 2)
    return reference(x, turns) if torch.compiler.is_compiling() else _Rotate.apply(x, torch.view_as_complex(turns))


def reference(x: Tensor, turns: Tensor) -> Tensor:
    """Compute the same with real numbers; ``turns`` is broadcast over the heads, (T, 1.., D / 2, 2)."""
    (even, odd), (cos, sin) = x.to(turns.dtype).unflatten(-1, (-1, 2)).unbind(-1), turns.unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


class _Rotate(torch.autograd.Function):
    """A complex product whose backward is the opposite turn, in one pass."""

    @staticmethod
    def forward(ctx, x, turns):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(turns)
        return _rotate(x, turns)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return _rotate(grad, ctx.saved_tensors[0].conj().resolve_conj()), None


def _rotate(x: Tensor, turns: Tensor) -> Tensor:
    if x.device.type != "cpu" or x.dtype == turns.real.dtype:
        pairs = torch.view_as_complex(x.to(turns.real.dtype).unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)
    # In blocks whose fp32 copy stays in the cache: the same numbers in a third of the time.
    out, rows = torch.empty(x.shape, dtype=x.dtype), max(1, _BLOCK_NUMBERS // max(1, x[:1].numel()))
    scratch = torch.empty((min(rows, len(x)), *x.shape[1:]), dtype=turns.real.dtype)
    for block, turn, target in zip(x.split(rows), turns.split(rows), out.split(rows), strict=True):
        wide = scratch[: len(block)].copy_(block)
        torch.view_as_complex(wide.unflatten(-1, (-1, 2))).mul_(turn)
        target.copy_(wide)
    return out
