"""RMSNorm (arXiv 1910.07467) and LayerNorm (arXiv 1607.06450), with the residual sum before them and a cast after.

For a token x = input + branch (or the input alone), with the mean m = mean_j x_j for LayerNorm and m = 0 for RMSNorm::

    r = (mean_j (x_j - m)^2 + eps)^(-1/2)        n = (x - m) r        y = n w (+ b)

and for g = dL/dy and the gradient h that reaches x from elsewhere, with LayerNorm's term in brackets::

    dx = h + r (g w - n mean_j(g w n) [- mean_j(g w)])        dw = sum over tokens of g n      db = sum over tokens of g

dx is the gradient of the input and of the branch. All is computed in fp32 (fp64 for fp64 inputs) and rounded once.

On the CPU the passes go through blocks of tokens that stay in the cache. PyTorch has a fused CPU kernel for LayerNorm's
backward, which with m = 0 gives RMSNorm's but for r mean_j(g w), added back. Sum, RMSNorm and cast to bf16 of
4096 x 384 take 3.2 ms against 4.7 as separate operations, their backward 4.6 against 5.2; of a whole training step that
is within the noise.

Shapes: T tokens (any leading shape), D features.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from enc.kernels import dispatch
from enc.kernels.tensors import at_least_fp32

_BLOCK_NUMBERS = 2**18
_MAX_SIZE = 4096


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """Normalise each token of x (..., D) to a root mean square of 1 and scale it by weight (D,).

    The result has the dtype asked for, that of ``x * weight`` by default.
    """
    return _norm(x, weight, eps, dtype)[1]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """Normalise each token of x (..., D) to mean 0 and variance 1, scale by weight (D,) and shift by bias (D,)."""
    return _norm(x, weight, eps, dtype, bias=bias)[1]


def add_rms_norm(
    x: Tensor, branch: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Return ``x + branch``, in the wider of their dtypes, and its ``rms_norm``; shapes are equal."""
    return _norm(x, weight, eps, dtype, branch=branch)


def add_layer_norm(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Return ``x + branch``, in the wider of their dtypes, and its ``layer_norm``; shapes are equal."""
    return _norm(x, weight, eps, dtype, branch=branch, bias=bias)


def why_not(device: str, dtype: torch.dtype, size: int = 0) -> str | None:
    """Say why no fused kernel normalises tokens of this size; None if one does."""
    too_long = f"fused norms hold a row of at most {_MAX_SIZE} numbers, this one has {size}"
    return dispatch.why_not_triton(device, dtype) or (too_long if size > _MAX_SIZE else None)


def reference(
    x: Tensor,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype | None = None,
    *,
    branch: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute (sum, norm) from the definition: LayerNorm with a bias, RMSNorm without."""
    total = x if branch is None else x + branch
    wide = total.to(at_least_fp32(total.dtype))
    if bias is not None:
        wide = wide - wide.mean(-1, keepdim=True)
    y = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
    return total, (y if bias is None else y + bias).to(dtype or torch.promote_types(total.dtype, weight.dtype))


def _norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype | None,
    *,
    branch: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    fused = x.device.type == "cpu" or why_not(x.device.type, x.dtype, x.shape[-1]) is None
    if torch.compiler.is_compiling() or not fused:
        return reference(x, weight, eps, dtype, branch=branch, bias=bias)  # inductor fuses it
    total = x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype)
    dtype = dtype or torch.promote_types(total, weight.dtype)
    found = _NormFunction.apply(x, branch, weight, bias, eps, dtype)  # type: ignore[no-untyped-call]
    return (x, found) if branch is None else found


class _NormFunction(torch.autograd.Function):
    """Returns y, with a branch (sum, y)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
    ) -> Tensor | tuple[Tensor, Tensor]:
        total, y, mean, inverse = _forward(x, branch, weight, bias, eps, dtype)
        ctx.save_for_backward(total, weight, mean, inverse)
        ctx.set_materialize_grads(False)
        ctx.dtypes = x.dtype, None if branch is None else branch.dtype
        return y if branch is None else (total, y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, mean, inverse = ctx.saved_tensors
        outer, grad = (None, *grads) if len(grads) == 1 else grads
        gradients: list[Tensor | None] = [None] * 4
        if grad is not None:
            gradients = [*_backward(outer, grad, total, weight, mean, inverse, *ctx.dtypes)]
        elif outer is not None:  # only the sum was used
            gradients[:2] = [None if dtype is None else outer.to(dtype) for dtype in ctx.dtypes]
        dx, dbranch, *of_parameters = gradients
        return dx, dbranch, *(None if sums is None else sums.to(weight.dtype) for sums in of_parameters), None, None


def _forward(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return sum, y, mean (None for RMSNorm) and inverse, the statistics (T, 1) in fp32 or fp64."""
    if x.device.type != "cpu":
        from enc.kernels import norms_triton

        return norms_triton.forward(x, branch, weight, bias, eps, dtype)
    total = x if branch is None else torch.empty(x.shape, dtype=torch.promote_types(x.dtype, branch.dtype))
    y, size = torch.empty(x.shape, dtype=dtype), x.shape[-1]
    inverse = torch.empty((*x.shape[:-1], 1), dtype=at_least_fp32(total.dtype)).view(-1, 1)
    mean = None if bias is None else torch.empty_like(inverse)
    w, b = weight.to(inverse.dtype), None if bias is None else bias.to(inverse.dtype)
    addends = None if branch is None else (_flat(x), _flat(branch))
    flat_total, flat_y = _flat(total), _flat(y)
    for tokens in _blocks(inverse, size):
        if addends is not None:
            torch.add(addends[0][tokens], addends[1][tokens].to(total.dtype), out=flat_total[tokens])
        wide = flat_total[tokens].to(inverse.dtype)
        if mean is None:
            norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
            torch.rsqrt(norm.square_().div_(size).add_(eps), out=inverse[tokens])
            flat_y[tokens] = (wide * inverse[tokens]).mul_(w)
        else:
            flat_y[tokens], mean[tokens], inverse[tokens] = torch.native_layer_norm(wide, (size,), w, b, eps)
    return total, y, mean, inverse


def _backward(
    outer: Tensor | None,
    grad: Tensor,
    total: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    inverse: Tensor,
    x_dtype: torch.dtype,
    branch_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Return the gradients of x, branch, weight and bias; those that do not exist are None."""
    if total.device.type != "cpu":
        from enc.kernels import norms_triton

        return norms_triton.backward(outer, grad, total, weight, mean, inverse, x_dtype, branch_dtype)
    w, size = weight.to(inverse.dtype), total.shape[-1]
    dx = torch.empty(total.shape, dtype=x_dtype)
    dbranch = dx if branch_dtype in (None, x_dtype) else torch.empty(total.shape, dtype=branch_dtype)
    dw, db = torch.zeros_like(w), None if mean is None else torch.zeros_like(w)
    flat_outer = None if outer is None else _flat(outer)
    flat_grad, flat_total, flat_dx, flat_dbranch = (_flat(t) for t in (grad, total, dx, dbranch))
    for tokens in _blocks(inverse, size):
        g, wide = flat_grad[tokens].to(w.dtype), flat_total[tokens].to(w.dtype)
        part, dw_part, db_part = _gradients_of_block(
            g, wide, w, None if mean is None else mean[tokens], inverse[tokens]
        )
        dw += dw_part
        if db is not None:
            db += db_part
        if flat_outer is not None:
            part += flat_outer[tokens]
        flat_dx[tokens] = part
        if dbranch is not dx:
            flat_dbranch[tokens] = part
    return dx, None if branch_dtype is None else dbranch, dw, db


def _gradients_of_block(
    g: Tensor, wide: Tensor, w: Tensor, mean: Tensor | None, inverse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx without the sum's own gradient, dw, and db (not for RMSNorm), by LayerNorm's kernel for either norm."""
    is_layer_norm, m = mean is not None, torch.zeros_like(inverse) if mean is None else mean
    part, dw, db = torch.ops.aten.native_layer_norm_backward(
        g, wide, w.shape, m, inverse, w, w if is_layer_norm else None, [True, True, is_layer_norm]
    )
    if not is_layer_norm:
        part += inverse * torch.mv(g, w).div_(len(w))[:, None]
    return part, dw, db


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _blocks(inverse: Tensor, size: int) -> Iterator[slice]:
    length = max(1, _BLOCK_NUMBERS // max(1, size))
    return (slice(start, start + length) for start in range(0, len(inverse), length))
