"""`masked_ce` on CUDA by logits that are computed in tiles and never stored (see `masked_ce_triton.py`).

Shapes: M positions, H hidden size, V vocabulary, C classes inside the softmax, S shares, n columns of a chunk.
"""

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from enc.kernels import dispatch
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

_MIN_COLUMNS = 1024
_PROGRAMS = 1056  # 8 for each of 132 multiprocessors: the last round costs little


class Tile(NamedTuple):
    """How a matrix product is cut."""

    positions: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


def _tile(head: Head) -> Tile:
    """Choose the largest tile that needs no more registers than there are."""
    if head.dtype == torch.float32 or head.hidden.shape[1] % 64:
        return Tile(64, 64, 32, 4, 2)
    stages = 4 if dispatch.capability(head.hidden.device) >= (9, 0) else 3
    plain = head.softcap is None and head.bias is None
    return Tile(128 if plain else 64, 128, 64, 8, stages)


@triton.jit
def _logits(
    X, W, B, positions, columns, x_stride, w_stride, hidden_size, softcap,
    BIASED: tl.constexpr, CAPPED: tl.constexpr, POSITIONS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    WHOLE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Return the fp32 logits of a tile (POSITIONS, COLUMNS). WHOLE: H is a multiple of DEPTH."""
    depth = tl.arange(0, DEPTH)
    X += positions.to(tl.int64)[:, None] * x_stride + depth[None, :]
    W += columns.to(tl.int64)[None, :] * w_stride + depth[:, None]
    u = tl.zeros((POSITIONS, COLUMNS), tl.float32)
    for start in range(0, hidden_size, DEPTH):
        if WHOLE:
            x, w = tl.load(X), tl.load(W)
        else:
            inside = depth < hidden_size - start
            x, w = tl.load(X, mask=inside[None, :], other=0.0), tl.load(W, mask=inside[:, None], other=0.0)
        if INTERPRETED:  # the interpreter cannot calculate in bf16
            x, w = x.to(tl.float32), w.to(tl.float32)
        u = tl.dot(x, w, u, input_precision="ieee")
        X += DEPTH
        W += DEPTH
    if BIASED:
        u += tl.load(B + columns).to(tl.float32)[None, :]
    return capped(u, softcap, CAPPED)


@triton.jit
def _forward_kernel(
    X, W, B, Y, TOP, TOTAL, TARGET, BEFORE, SUM,
    num_positions, num_classes, hidden_size, x_stride, w_stride, share, softcap,
    BIASED: tl.constexpr, CAPPED: tl.constexpr, SMOOTHED: tl.constexpr, POSITIONS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, WHOLE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write what a share of the columns says of each position: outputs are (S, M)."""
    positions = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    first = tl.program_id(1) * share
    y = tl.load(Y + positions, mask=positions < num_positions, other=-1).to(tl.int32)
    if tl.max(y, 0) < 0:
        return
    top = tl.full((POSITIONS,), -float("inf"), tl.float32)
    before = tl.full((POSITIONS,), -float("inf"), tl.float32)  # largest logit of the columns before the target
    total, target, sum_z = tl.zeros_like(top), tl.zeros_like(top), tl.zeros_like(top)
    for start in range(first, tl.minimum(first + share, num_classes), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        z = _logits(
            X, W, B, tl.minimum(positions, num_positions - 1), tl.minimum(columns, num_classes - 1), x_stride, w_stride,
            hidden_size, softcap, BIASED, CAPPED, POSITIONS, COLUMNS, DEPTH, WHOLE, INTERPRETED,
        )  # fmt: skip
        inside = columns < num_classes
        if SMOOTHED:
            sum_z += tl.sum(tl.where(inside[None, :], z, 0.0), 1)
        z = tl.where(inside[None, :], z, -float("inf"))
        largest = tl.max(z, 1)
        higher = tl.maximum(top, largest)
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher[:, None]), 1)
        top = higher
        here = (y >= start) & (y < start + COLUMNS)
        before = tl.where(y >= start + COLUMNS, tl.maximum(before, largest), before)
        if tl.max(here.to(tl.int32), 0) > 0:
            target += tl.sum(tl.where(columns[None, :] == y[:, None], z, 0.0), 1)
            smaller = tl.max(tl.where(columns[None, :] < y[:, None], z, -float("inf")), 1)
            before = tl.where(here, tl.maximum(before, smaller), before)
    places = tl.program_id(1).to(tl.int64) * num_positions + positions
    tl.store(TOP + places, top, mask=positions < num_positions)
    tl.store(TOTAL + places, total, mask=positions < num_positions)
    tl.store(TARGET + places, target, mask=positions < num_positions)
    tl.store(BEFORE + places, before, mask=positions < num_positions)
    if SMOOTHED:
        tl.store(SUM + places, sum_z, mask=positions < num_positions)


@triton.jit
def _join_kernel(
    Y, TOP, TOTAL, TARGET, BEFORE, SUM, LSE, LOSS, CORRECT,
    num_positions, num_classes, shares, z_loss, smoothing,
    SMOOTHED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Join the shares of each position, in their order."""
    positions = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    labelled = tl.load(Y + positions, mask=positions < num_positions, other=-1) >= 0
    top = tl.full((BLOCK,), -float("inf"), tl.float32)
    before = tl.full((BLOCK,), -float("inf"), tl.float32)
    total, target, sum_z = tl.zeros_like(top), tl.zeros_like(top), tl.zeros_like(top)
    for share in range(shares):
        places = share * num_positions + positions
        largest = tl.load(TOP + places, mask=labelled, other=0.0)
        higher = tl.maximum(top, largest)
        part = tl.load(TOTAL + places, mask=labelled, other=1.0)
        total = total * tl.exp(top - higher) + part * tl.exp(largest - higher)
        top = higher
        target += tl.load(TARGET + places, mask=labelled, other=0.0)
        before = tl.maximum(before, tl.load(BEFORE + places, mask=labelled, other=0.0))
        if SMOOTHED:
            sum_z += tl.load(SUM + places, mask=labelled, other=0.0)
    lse = top + tl.log(total)
    loss = position_loss(lse, target, sum_z, z_loss, smoothing, num_classes)
    correct = labelled & (target >= top) & (target > before)
    tl.store(LSE + positions, tl.where(labelled, lse, 0.0), mask=positions < num_positions)
    tl.store(LOSS + positions, tl.where(labelled, loss, 0.0), mask=positions < num_positions)
    tl.store(CORRECT + positions, correct.to(tl.int32), mask=positions < num_positions)


def forward(head: Head) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, logsumexp and number of correct positions."""
    x, weight, bias, targets = head.labelled_hidden(), head.contiguous_weight(), head.matmul_bias(), head.targets
    smoothed = head.label_smoothing > 0
    num_positions, tile = len(x), _tile(head)
    position_tiles = triton.cdiv(num_positions, tile.positions)
    column_tiles = triton.cdiv(head.num_classes, tile.columns)
    programs = min(triton.cdiv(_PROGRAMS, position_tiles), column_tiles)  # for each tile of positions
    share = triton.cdiv(column_tiles, programs)  # tiles of each program
    shares = triton.cdiv(column_tiles, share)
    partial = x.new_empty(5 if smoothed else 4, shares, num_positions, dtype=torch.float32)
    parts = [*partial.unbind(0), *([] if smoothed else [None])]
    _forward_kernel[(position_tiles, shares)](
        x, weight, bias, targets, *parts,
        num_positions, head.num_classes, x.shape[1], x.stride(0), weight.stride(0), share * tile.columns,
        head.softcap or 1.0, SMOOTHED=smoothed, **_constants(head, tile),
    )  # fmt: skip
    loss, lse = x.new_empty(2, num_positions, dtype=torch.float32).unbind(0)
    correct = targets.new_empty(num_positions, dtype=torch.int32)
    _join_kernel[(triton.cdiv(num_positions, 128),)](
        targets, *parts, lse, loss, correct, num_positions, head.num_classes, shares, head.z_loss, head.label_smoothing,
        SMOOTHED=smoothed, BLOCK=128,
    )  # fmt: skip
    return loss.sum(), lse, correct.sum()


@triton.jit
def _dz_kernel(
    X, W, B, Y, LSE, GRAD, DZ, DB,
    num_positions, num_classes, hidden_size, x_stride, w_stride, dz_stride, first, z_loss, smoothing, softcap,
    BIASED: tl.constexpr, CAPPED: tl.constexpr, POSITIONS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    WHOLE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write a tile of dz (M, dz_stride), of columns from `first` on, and its sums over the positions of the tile.

    dz has whole tiles of columns; what stands in columns after the last class is not used.
    """
    positions = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    local = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    columns = first + local
    y = tl.load(Y + positions, mask=positions < num_positions, other=-1).to(tl.int32)
    places = positions.to(tl.int64)[:, None] * dz_stride + local[None, :]
    inside = (positions < num_positions)[:, None]
    if tl.max(y, 0) < 0:
        tl.store(DZ + places, tl.zeros((POSITIONS, COLUMNS), DZ.dtype.element_ty), mask=inside)
        if BIASED:
            tl.store(DB + tl.program_id(0) * dz_stride + local, tl.zeros((COLUMNS,), tl.float32))
        return
    z = _logits(
        X, W, B, tl.minimum(positions, num_positions - 1), tl.minimum(columns, num_classes - 1), x_stride, w_stride,
        hidden_size, softcap, BIASED, CAPPED, POSITIONS, COLUMNS, DEPTH, WHOLE, INTERPRETED,
    )  # fmt: skip
    lse = tl.load(LSE + positions, mask=y >= 0, other=0.0)
    scale = tl.where(y >= 0, tl.load(GRAD).to(tl.float32), 0.0)
    is_target = columns[None, :] == y[:, None]
    of_softmax = scale * (1.0 + 2.0 * z_loss * lse)
    lse = tl.where(y >= 0, lse, float("inf"))  # exp(z) might be infinite
    dz = softmax_gradient(z, lse[:, None], is_target, scale[:, None], of_softmax[:, None], smoothing, num_classes)
    dz = uncapped_gradient(dz, z, softcap, CAPPED)
    tl.store(DZ + places, dz.to(DZ.dtype.element_ty), mask=inside)
    if BIASED:
        tl.store(DB + tl.program_id(0) * dz_stride + local, tl.sum(dz, 0))


def backward(head: Head, grad: Tensor, lse: Tensor) -> Gradients:
    """Return the gradients, times the incoming one."""
    x, weight, bias, tile = head.labelled_hidden(), head.contiguous_weight(), head.matmul_bias(), _tile(head)
    dx = torch.empty_like(x, dtype=torch.float32)
    dw = torch.empty(weight.shape, dtype=head.weight.dtype, device=x.device)
    db = None if head.bias is None else torch.zeros_like(head.bias)
    size = min(max(BUFFER_BYTES // (len(x) * x.itemsize), _MIN_COLUMNS), head.num_classes)
    size = triton.cdiv(size, tile.columns) * tile.columns
    position_tiles, buffer = triton.cdiv(len(x), tile.positions), x.new_empty(len(x), size)
    sums = None if bias is None else x.new_empty(position_tiles, size, dtype=torch.float32)
    for start in range(0, head.num_classes, size):
        columns = slice(start, min(start + size, head.num_classes))
        dz = buffer[:, : columns.stop - start]
        _dz_kernel[(position_tiles, triton.cdiv(dz.shape[1], tile.columns))](
            x, weight, bias, head.targets, lse, grad, dz, sums,
            len(x), head.num_classes, x.shape[1], x.stride(0), weight.stride(0), size, start,
            head.z_loss, head.label_smoothing, head.softcap or 1.0, **_constants(head, tile),
        )  # fmt: skip
        product(dx, dz, weight[columns], add=start > 0)
        product(dw[columns], dz.T, x, add=False)
        if db is not None and sums is not None:
            db[columns] = sums[:, : dz.shape[1]].sum(0)
    dw[head.num_classes :] = 0
    return dx.to(head.hidden.dtype), dw, db


def _constants(head: Head, tile: Tile) -> dict[str, int | bool]:
    return {
        "BIASED": head.bias is not None,
        "CAPPED": head.softcap is not None,
        "POSITIONS": tile.positions,
        "COLUMNS": tile.columns,
        "DEPTH": tile.depth,
        "WHOLE": head.hidden.shape[1] % tile.depth == 0,
        "INTERPRETED": os.environ.get("TRITON_INTERPRET") == "1",
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
