"""`masked_ce` on CUDA by logits that are stored: one kernel between cuBLAS's products (see `masked_ce_triton.py`).

Shapes: M positions, H hidden size, V vocabulary, C classes inside the softmax.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from enc.kernels.masked_ce_torch import Head
from enc.kernels.masked_ce_triton import (
    BUFFER_BYTES,
    Gradients,
    capped,
    position_loss,
    product,
    softmax_gradient,
    uncapped_gradient,
)

_MAX_BLOCK = 8192


@triton.jit
def _stored_kernel(
    Z, Y, LSE, LOSS, CORRECT,
    z_stride, num_columns, num_classes, z_loss, smoothing, softcap,
    CAPPED: tl.constexpr, SMOOTHED: tl.constexpr, WITH_GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Turn the logits of one position into dz, in place, for an incoming gradient of 1."""
    position = tl.program_id(0)
    Z += position.to(tl.int64) * z_stride
    y = tl.load(Y + position).to(tl.int32)
    if y < 0:
        tl.store(LSE + position, 0.0)
        tl.store(LOSS + position, 0.0)
        tl.store(CORRECT + position, 0)
        if WITH_GRAD:
            for start in range(0, num_columns, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                tl.store(Z + columns, tl.zeros((BLOCK,), Z.dtype.element_ty), mask=columns < num_columns)
        return
    target = capped(tl.load(Z + y).to(tl.float32), softcap, CAPPED)
    top, total, sum_z, beaten = -float("inf"), 0.0, 0.0, 0
    for start in range(0, num_classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < num_classes
        z = capped(tl.load(Z + columns, mask=inside, other=0.0).to(tl.float32), softcap, CAPPED)
        if SMOOTHED:
            sum_z += tl.sum(tl.where(inside, z, 0.0), 0)
        z = tl.where(inside, z, -float("inf"))
        higher = tl.maximum(top, tl.max(z, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher), 0)
        top = higher
        beaten += tl.sum(((z > target) | ((z == target) & (columns < y))).to(tl.int32), 0)
    lse = top + tl.log(total)
    tl.store(LSE + position, lse)
    tl.store(LOSS + position, position_loss(lse, target, sum_z, z_loss, smoothing, num_classes))
    tl.store(CORRECT + position, tl.where(beaten == 0, 1, 0))
    if WITH_GRAD:
        for start in range(0, num_columns, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < num_classes
            z = capped(tl.load(Z + columns, mask=inside, other=0.0).to(tl.float32), softcap, CAPPED)
            dz = softmax_gradient(z, lse, columns == y, 1.0, 1.0 + 2.0 * z_loss * lse, smoothing, num_classes)
            dz = tl.where(inside, uncapped_gradient(dz, z, softcap, CAPPED), 0.0)
            tl.store(Z + columns, dz.to(Z.dtype.element_ty), mask=columns < num_columns)


def forward(head: Head, with_grad: bool) -> tuple[Tensor, Tensor, Tensor, Gradients | None]:
    """Return loss, logsumexp, number of correct positions, and the gradients for an incoming gradient of 1."""
    x, weight, bias, targets = head.labelled_hidden(), head.contiguous_weight(), head.matmul_bias(), head.targets
    num_positions, num_columns = len(x), len(weight)
    loss, lse = x.new_empty(2, num_positions, dtype=torch.float32).unbind(0)
    correct = targets.new_empty(num_positions, dtype=torch.int32)
    dx = torch.empty_like(x) if with_grad else x.new_empty(0)
    dw = torch.empty_like(weight, dtype=torch.float32) if with_grad else x.new_empty(0)
    db = x.new_zeros(num_columns if with_grad and bias is not None else 0, dtype=torch.float32)
    size = _chunk_length(num_positions, weight)
    buffer = x.new_empty(size, num_columns)
    for start in range(0, num_positions, size):
        positions = slice(start, min(start + size, num_positions))
        z = buffer[: positions.stop - start]
        if bias is None:
            torch.mm(x[positions], weight.T, out=z)
        else:
            torch.addmm(bias, x[positions], weight.T, out=z)
        _stored_kernel[(len(z),)](
            z, targets[positions], lse[positions], loss[positions], correct[positions],
            z.stride(0), num_columns, head.num_classes, head.z_loss, head.label_smoothing, head.softcap or 1.0,
            CAPPED=head.softcap is not None, SMOOTHED=head.label_smoothing > 0, WITH_GRAD=with_grad,
            BLOCK=min(triton.next_power_of_2(num_columns), _MAX_BLOCK), num_warps=16,
        )  # fmt: skip
        if with_grad:
            torch.mm(z, weight, out=dx[positions])
            product(dw, z.T, x[positions], add=start > 0)
            if bias is not None:
                db += z.sum(0, dtype=torch.float32)
    if not with_grad:
        return loss.sum(), lse, correct.sum(), None
    of_bias = None if head.bias is None else db.to(head.bias.dtype)
    return loss.sum(), lse, correct.sum(), (dx.to(head.hidden.dtype), dw.to(head.weight.dtype), of_bias)


def _chunk_length(num_positions: int, weight: Tensor) -> int:
    """Return the positions of a chunk, about equally many in each: what half an fp32 dW and BUFFER_BYTES hold."""
    limit = (BUFFER_BYTES + 2 * weight.numel()) // (len(weight) * weight.dtype.itemsize)
    chunks = -(-num_positions // max(limit // 128 * 128, 128))
    return min(num_positions, -(-num_positions // chunks // 128) * 128)


@triton.jit
def _scale_kernel(G, SCALE, numel, BLOCK: tl.constexpr):
    scale = tl.load(SCALE).to(tl.float32)
    if scale == 1.0:
        return
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(G + places, mask=places < numel, other=0.0).to(tl.float32)
    tl.store(G + places, (g * scale).to(G.dtype.element_ty), mask=places < numel)


def scale_(gradient: Tensor, scale: Tensor) -> Tensor:
    """Multiply a contiguous tensor in place by a scalar on the device; leave it alone if that is 1."""
    if gradient.numel():
        _scale_kernel[(triton.cdiv(gradient.numel(), 4096),)](gradient, scale, gradient.numel(), BLOCK=4096)
    return gradient
