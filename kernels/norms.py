"""RMSNorm (arXiv 1910.07467) and LayerNorm (arXiv 1607.06450), with the residual sum before them and a cast after.

For a row x = input + branch (or the input alone), with the mean m = mean_j x_j for LayerNorm and m = 0 for RMSNorm::

    r = (mean_j (x_j - m)^2 + eps)^(-1/2)        n = (x - m) r        y = n w (+ b)

and for g = dL/dy and the gradient h that reaches x from elsewhere, with LayerNorm's term in brackets::

    dx = h + r (g w - n mean_j(g w n) [- mean_j(g w)])        dw = sum over rows of g n        db = sum over rows of g

dx is the gradient of the input and of the branch. All is computed in fp32 (fp64 for fp64 inputs) and rounded once.

On the CPU the passes go through blocks of rows that stay in the cache. PyTorch has a fused CPU kernel for LayerNorm's
backward, which with m = 0 gives RMSNorm's but for r mean_j(g w), added back. Sum, RMSNorm and cast to bf16 of
4096 x 384 take 3.2 ms against 4.7 as separate operations, their backward 4.6 against 5.2; of a whole training step that
is within the noise.

Shapes: T rows (any leading shape), D features.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from enc.kernels import chips

_BLOCK_NUMBERS = 2**18
_MAX_SIZE = 4096


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """Normalise the rows of x (..., D) to a root mean square of 1 and scale them by weight (D,).

    The result has the dtype asked for, that of ``x * weight`` by default.
    """
    return _norm(x, None, weight, None, eps, False, dtype)[1]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """Normalise the rows of x (..., D) to mean 0 and variance 1, scale by weight (D,) and shift by bias (D,)."""
    return _norm(x, None, weight, bias, eps, True, dtype)[1]


def add_rms_norm(
    x: Tensor, branch: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Return ``x + branch``, in the wider of their dtypes, and its ``rms_norm``; shapes are equal."""
    return _norm(x, branch, weight, None, eps, False, dtype)


def add_layer_norm(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Return ``x + branch``, in the wider of their dtypes, and its ``layer_norm``; shapes are equal."""
    return _norm(x, branch, weight, bias, eps, True, dtype)


def why_not(device: str, dtype: torch.dtype, size: int = 0) -> str | None:
    """Say why no fused kernel normalises rows of this size; None if one does."""
    too_long = f"fused norms hold a row of at most {_MAX_SIZE} numbers, this one has {size}"
    return chips.why_not_triton(device, dtype) or (too_long if size > _MAX_SIZE else None)


def reference(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centered: bool,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute (sum, norm) from the definition; ``centered`` is LayerNorm."""
    total = x if branch is None else x + branch
    wide = total.to(_wide(total.dtype))
    if centered:
        wide = wide - wide.mean(-1, keepdim=True)
    y = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
    return total, (y if bias is None else y + bias).to(dtype or torch.promote_types(total.dtype, weight.dtype))


def _norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centered: bool,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    fused = x.device.type == "cpu" or why_not(x.device.type, x.dtype, x.shape[-1]) is None
    if torch.compiler.is_compiling() or not fused:
        return reference(x, branch, weight, bias, eps, centered, dtype)  # inductor fuses it
    total = x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype)
    dtype = dtype or torch.promote_types(total, weight.dtype)
    if branch is None:
        return x, _Norm.apply(x, None, weight, bias, eps, centered, dtype)
    return _Norm.apply(x, branch, weight, bias, eps, centered, dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _Norm(torch.autograd.Function):
    """Returns y, with a branch (sum, y)."""

    @staticmethod
    def forward(ctx, x, branch, weight, bias, eps, centered, dtype):  # type: ignore[no-untyped-def]
        total, y, mean, inverse = _forward(x, branch, weight, bias, eps, centered, dtype)
        ctx.save_for_backward(total, weight, mean, inverse)
        ctx.set_materialize_grads(False)
        ctx.dtypes = x.dtype, None if branch is None else branch.dtype
        return y if branch is None else (total, y)

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        total, weight, mean, inverse = ctx.saved_tensors
        outer, grad = grads if len(grads) == 2 else (None, *grads)
        x_dtype, branch_dtype = ctx.dtypes
        dw = db = None
        if grad is not None:
            dx, dbranch, dw, db = _backward(outer, grad, total, weight, mean, inverse, x_dtype, branch_dtype)
        elif outer is not None:  # only the sum was used
            dx, dbranch = outer.to(x_dtype), None if branch_dtype is None else outer.to(branch_dtype)
        else:
            dx = dbranch = None
        dw, db = (None if sums is None else sums.to(weight.dtype) for sums in (dw, db))
        return dx, dbranch, dw, db, None, None, None


def _forward(x, branch, weight, bias, eps, centered, dtype):  # type: ignore[no-untyped-def]
    """Return sum, y, mean (None for RMSNorm) and inverse, the statistics (T, 1) in fp32 or fp64."""
    if x.device.type != "cpu":
        from enc.kernels import norms_triton

        return norms_triton.forward(x, branch, weight, bias, eps, dtype)
    total = x if branch is None else torch.empty(x.shape, dtype=torch.promote_types(x.dtype, branch.dtype))
    y, size = torch.empty(x.shape, dtype=dtype), x.shape[-1]
    inverse = torch.empty((*x.shape[:-1], 1), dtype=_wide(total.dtype)).view(-1, 1)
    mean = torch.empty_like(inverse) if centered else None
    w, b = weight.to(inverse.dtype), None if bias is None else bias.to(inverse.dtype)
    rows_of = [None if t is None else t.reshape(-1, t.shape[-1]) for t in (x, branch, total, y)]
    for rows in _blocks(inverse, size):
        x_, branch_, total_, y_ = (None if t is None else t[rows] for t in rows_of)
        if branch_ is not None:
            torch.add(x_, branch_.to(total_.dtype), out=total_)
        wide = total_.to(inverse.dtype)
        if centered:
            n, mean[rows], inverse[rows] = torch.native_layer_norm(wide, (size,), w, b, eps)
        else:
            norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
            torch.rsqrt(norm.square_().div_(size).add_(eps), out=inverse[rows])
            n = (wide * inverse[rows]).mul_(w)
        y_.copy_(n)
    return total, y, mean, inverse


def _backward(outer, grad, total, weight, mean, inverse, x_dtype, branch_dtype):  # type: ignore[no-untyped-def]
    """Return the gradients of x, branch, weight and bias; those that do not exist are None."""
    if total.device.type != "cpu":
        from enc.kernels import norms_triton

        return norms_triton.backward(outer, grad, total, weight, mean, inverse, x_dtype, branch_dtype)
    size, acc = total.shape[-1], inverse.dtype
    dx, w, zero = torch.empty(total.shape, dtype=x_dtype), weight.to(acc), torch.zeros_like(inverse)
    dbranch = dx if branch_dtype in (None, x_dtype) else torch.empty(total.shape, dtype=branch_dtype)
    dw, db = torch.zeros(size, dtype=acc), None if mean is None else torch.zeros(size, dtype=acc)
    rows_of = [None if t is None else t.reshape(-1, size) for t in (outer, grad, total, dx, dbranch)]
    for rows in _blocks(inverse, size):
        outer_, grad_, total_, dx_, dbranch_ = (None if t is None else t[rows] for t in rows_of)
        g, wide, r, m = grad_.to(acc), total_.to(acc), inverse[rows], (zero if mean is None else mean)[rows]
        part, dw_, db_ = torch.ops.aten.native_layer_norm_backward(
            g, wide, (size,), m, r, w, None if mean is None else w, [True, True, mean is not None]
        )
        dw += dw_
        if mean is None:
            part += r * torch.mv(g, w).div_(size)[:, None]
        else:
            db += db_
        if outer_ is not None:
            part += outer_
        dx_.copy_(part)
        if dbranch is not dx:
            dbranch_.copy_(part)
    return dx, None if branch_dtype is None else dbranch, dw, db


def _blocks(inverse: Tensor, size: int) -> Iterator[slice]:
    rows = max(1, _BLOCK_NUMBERS // max(1, size))
    return (slice(start, start + rows) for start in range(0, len(inverse), rows))
