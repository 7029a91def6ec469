"""The kernels of `swiglu`: elementwise, in fp32."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


@triton.jit
def _forward_kernel(A, B, H, count, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    a = tl.load(A + places, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(B + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(H + places, (a * tl.sigmoid(a) * b).to(H.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(GRAD, A, B, DA, DB, count, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    g = tl.load(GRAD + places, mask=inside, other=0.0).to(tl.float32)
    a = tl.load(A + places, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(B + places, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(a)
    tl.store(DA + places, (g * b * s * (1.0 + a * (1.0 - s))).to(DA.dtype.element_ty), mask=inside)
    tl.store(DB + places, (g * a * s).to(DB.dtype.element_ty), mask=inside)


def forward(a: Tensor, b: Tensor) -> Tensor:
    """Return silu(a) b, contiguous."""
    h = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    if a.numel():
        _forward_kernel[_grid(a)](a.contiguous(), b.contiguous(), h, a.numel(), BLOCK=_BLOCK, num_warps=8)
    return h


def backward(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of a and b, contiguous."""
    da, db = (torch.empty(a.shape, dtype=a.dtype, device=a.device) for _ in range(2))
    if a.numel():
        grad, a, b = (t.contiguous() for t in (grad, a, b))
        _backward_kernel[_grid(a)](grad, a, b, da, db, a.numel(), BLOCK=_BLOCK, num_warps=8)
    return da, db


def _grid(a: Tensor) -> tuple[int]:
    return (triton.cdiv(a.numel(), _BLOCK),)
