"""The kernels of `norms`: one pass over the tokens each way, statistics in fp32.

A program of the forward pass takes a tile of whole tokens. The backward pass has a fixed number of programs, each of
which takes every so many-th tile and writes one partial dw and db; PyTorch adds those up in order, so that the sums
have the same bits on every run and every GPU.

Shapes: T tokens, D features.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_FORWARD_TILE, _BACKWARD_TILE = 4096, 2048  # numbers in a program's tile; the backward pass holds about twice as many
_PROGRAMS = 1024  # of the backward pass: several for each multiprocessor of any GPU


@triton.jit
def _forward_kernel(
    X, BRANCH, W, B, SUM, Y, MEAN, INVERSE, num_tokens, size, eps,
    HAS_BRANCH: tl.constexpr, CENTERED: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    tokens, features = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, FEATURES)
    inside = (tokens[:, None] < num_tokens) & (features[None, :] < size)
    places = tokens.to(tl.int64)[:, None] * size + features[None, :]
    x = tl.load(X + places, mask=inside, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        x += tl.load(BRANCH + places, mask=inside, other=0.0).to(tl.float32)
        total = x.to(SUM.dtype.element_ty)
        tl.store(SUM + places, total, mask=inside)
        x = total.to(tl.float32)
    if CENTERED:
        mean = tl.sum(x, 1) / size
        tl.store(MEAN + tokens, mean, mask=tokens < num_tokens)
        x = tl.where(inside, x - mean[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(x * x, 1) / size + eps)
    tl.store(INVERSE + tokens, inverse, mask=tokens < num_tokens)
    y = x * inverse[:, None] * tl.load(W + features, mask=features < size, other=0.0).to(tl.float32)[None, :]
    if CENTERED:
        y += tl.load(B + features, mask=features < size, other=0.0).to(tl.float32)[None, :]
    tl.store(Y + places, y.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    OUTER, GRAD, X, W, MEAN, INVERSE, DX, DBRANCH, DW, DB, num_tokens, size,
    HAS_OUTER: tl.constexpr, HAS_BRANCH: tl.constexpr, CENTERED: tl.constexpr,
    TOKENS: tl.constexpr, FEATURES: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    features = tl.arange(0, FEATURES)
    w = tl.load(W + features, mask=features < size, other=0.0).to(tl.float32)[None, :]
    dw = tl.zeros((TOKENS, FEATURES), tl.float32)
    db = tl.zeros((TOKENS, FEATURES), tl.float32)
    for start in range(tl.program_id(0) * TOKENS, num_tokens, PROGRAMS * TOKENS):
        tokens = start + tl.arange(0, TOKENS)
        inside = (tokens[:, None] < num_tokens) & (features[None, :] < size)
        places = tokens.to(tl.int64)[:, None] * size + features[None, :]
        n = tl.load(X + places, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(GRAD + places, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.load(INVERSE + tokens, mask=tokens < num_tokens, other=0.0)[:, None]
        if CENTERED:
            n = tl.where(inside, n - tl.load(MEAN + tokens, mask=tokens < num_tokens, other=0.0)[:, None], 0.0)
        n *= inverse
        dw += g * n
        if CENTERED:
            db += g
        g *= w
        dx = g - n * (tl.sum(g * n, 1) / size)[:, None]
        if CENTERED:
            dx -= (tl.sum(g, 1) / size)[:, None]
        dx *= inverse
        if HAS_OUTER:
            dx += tl.load(OUTER + places, mask=inside, other=0.0).to(tl.float32)
        tl.store(DX + places, dx.to(DX.dtype.element_ty), mask=inside)
        if HAS_BRANCH:
            tl.store(DBRANCH + places, dx.to(DBRANCH.dtype.element_ty), mask=inside)
    partial = tl.program_id(0).to(tl.int64) * size + features
    tl.store(DW + partial, tl.sum(dw, 0), mask=features < size)
    if CENTERED:
        tl.store(DB + partial, tl.sum(db, 0), mask=features < size)


def forward(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return sum, y, mean (None for RMSNorm, which has no bias) and inverse of x (..., D)."""
    x = x.contiguous()
    total = x if branch is None else x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, branch.dtype))
    size, num_tokens = x.shape[-1], x.numel() // max(1, x.shape[-1])
    y, inverse = x.new_empty(x.shape, dtype=dtype), x.new_empty((num_tokens, 1), dtype=torch.float32)
    mean = None if bias is None else torch.empty_like(inverse)
    if num_tokens:
        config = _config(size, _FORWARD_TILE)
        _forward_kernel[(triton.cdiv(num_tokens, config["TOKENS"]),)](
            x, x if branch is None else branch.contiguous(), weight, weight if bias is None else bias, total, y,
            inverse if mean is None else mean, inverse, num_tokens, size, eps,
            HAS_BRANCH=branch is not None, CENTERED=bias is not None, **config,
        )  # fmt: skip
    return total, y, mean, inverse


def backward(
    outer: Tensor | None,
    grad: Tensor,
    total: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    inverse: Tensor,
    x_dtype: torch.dtype,
    branch_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Return the gradients of x, branch, weight and bias (None without one)."""
    size, num_tokens = total.shape[-1], len(inverse)
    config = _config(size, _BACKWARD_TILE)
    programs = max(1, min(_PROGRAMS, triton.cdiv(num_tokens, config["TOKENS"])))
    dx = total.new_empty(total.shape, dtype=x_dtype)
    dbranch = dx if branch_dtype in (None, x_dtype) else total.new_empty(total.shape, dtype=branch_dtype)
    dw = total.new_empty((programs, size), dtype=torch.float32)
    db = None if mean is None else torch.empty_like(dw)
    grad = grad.contiguous()
    _backward_kernel[(programs,)](
        grad if outer is None else outer.contiguous(), grad, total, weight, inverse if mean is None else mean, inverse,
        dx, dbranch, dw, dw if db is None else db, num_tokens, size, HAS_OUTER=outer is not None,
        HAS_BRANCH=dbranch is not dx, CENTERED=mean is not None, PROGRAMS=programs, **config,
    )  # fmt: skip
    return dx, None if branch_dtype is None else dbranch, dw.sum(0), None if db is None else db.sum(0)


def _config(size: int, tile: int) -> dict[str, Any]:
    """Return the tile: whole tokens, at least one; a warp for about 512 numbers."""
    features = triton.next_power_of_2(size)
    tokens = max(1, tile // features)
    return {"TOKENS": tokens, "FEATURES": features, "num_warps": min(16, max(4, tokens * features // 512))}
