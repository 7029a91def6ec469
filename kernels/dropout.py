"""Dropout (Srivastava et al. 2014), which on the CPU draws 16 random bits an element.

For a uniform integer u in 0..65535 and d = round(65536 p)::

    keep = u >= d        y = x keep / (1 - d / 65536)

so that the expectation is exact, and the rate is p to 8e-6. PyTorch draws a double for each element, one after the
other, and keeps a mask as wide as x: 5.4 ns an element on one core for the mask alone, which with dropout 0.1 was 23 %
of a training step of MPNet. Here bits are drawn in blocks that stay in the cache, and drawn again from their seed in
the backward pass, so that nothing is kept.

Elsewhere, and under torch.compile, dropout is PyTorch's, which is fused there.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_LEVELS = 2**16
_PER_WORD = 4  # 16-bit draws in a 64-bit word
_BLOCK = 2**17  # elements


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """Set elements of x to 0 with probability p and scale the others up, drawing from torch's global generator.

    Any shape and floating dtype, which the result has too. Without `training`, or with p 0, x itself is returned.
    """
    if not training or p == 0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    return _DropoutFunction.apply(x, p)  # type: ignore[no-untyped-call, no-any-return]


def reference(x: Tensor, p: float, seed: int) -> Tensor:
    """Compute the same from the definition, for the seed that the operation drew."""
    generator, size = torch.Generator().manual_seed(seed), x.numel()
    blocks = [keep_mask(torch.Size([min(_BLOCK, size - start)]), p, generator) for start in range(0, size, _BLOCK)]
    keep = torch.cat(blocks).view(x.shape) if blocks else torch.ones_like(x, dtype=torch.bool)
    return torch.where(keep, x * scale(p), torch.zeros_like(x))


def keep_mask(
    shape: torch.Size, p: float, generator: torch.Generator | None = None, dtype: torch.dtype = torch.bool
) -> Tensor:
    """Return which elements are kept, 1 for yes, in any dtype on the CPU."""
    count = shape.numel()
    words = torch.empty(-(-count // _PER_WORD), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    kept = torch.empty(count, dtype=dtype)
    return torch.ge(words.view(torch.int16)[:count], _dropped(p) - _LEVELS // 2, out=kept).view(shape)


def scale(p: float) -> float:
    """Return the factor of kept elements."""
    kept = _LEVELS - _dropped(p)
    return _LEVELS / kept if kept else 0.0


def _dropped(p: float) -> int:
    return round(p * _LEVELS)


class _DropoutFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        ctx.seed, ctx.p = int(torch.randint(2**62, (1,))), p
        return _dropped_out(x, p, ctx.seed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _dropped_out(grad, ctx.p, ctx.seed), None


def _dropped_out(x: Tensor, p: float, seed: int) -> Tensor:
    generator, factor = torch.Generator().manual_seed(seed), scale(p)
    y = torch.empty(x.shape, dtype=x.dtype)
    for part, out in zip(x.reshape(-1).split(_BLOCK), y.view(-1).split(_BLOCK), strict=True):
        torch.mul(part, keep_mask(part.shape, p, generator, x.dtype), out=out).mul_(factor)
    return y
