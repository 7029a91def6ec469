"""`masked_ce` on CUDA, in Triton and cuBLAS: two ways, both deterministic, without atomics.

**store** The rows go through in chunks. cuBLAS makes the logits of a chunk, rounded to the dtype of the matmuls as
PyTorch's own would be, and one kernel turns them, in fp32 and in place, into loss, logsumexp and dz; cuBLAS then makes
dx and adds to dW in fp32. 6 M H V operations. The gradients exist after the forward pass; the backward pass multiplies
them by the incoming gradient, or leaves them alone where it is 1.

**recompute** Forward, a program owns a tile of rows and a share of the columns, computes one fp32 tile of logits after
the other, and keeps running maximum and sum of exponentials; another kernel joins the shares in a fixed order. Only
logsumexp is kept. Backward, the columns go through in chunks: a kernel computes the fp32 logits again and writes dz of
the chunk, with the incoming gradient in it; cuBLAS adds to dx in fp32 and writes that part of dW, once. 8 M H V
operations, fewer bytes a logit, no gradient between the passes.

Whatever is in fp32 between the two matmuls of a pass is exact to fp32; dz is rounded to the dtype of the matmuls.
Tiles without a labelled row do no work.

Shapes: M rows, H hidden size, V rows of the weight, C classes inside the softmax, S shares, n columns of a chunk.
"""

# mypy: allow-untyped-defs

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from enc.kernels import dispatch
from enc.kernels.masked_ce_torch import Head

_BUFFER_BYTES = 64 * 2**20
_MIN_COLUMNS = 1024
_PROGRAMS = 1056  # 8 for each of 132 multiprocessors: the last round costs little
_MAX_STORED_BLOCK = 8192


class Tile(NamedTuple):
    """How a matrix product is cut."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


def way(hidden_size: int, dtype: torch.dtype) -> str:
    """Choose between "store" and "recompute".

    Storing takes about 10 bytes of traffic a logit, recomputing 2 H operations, which is less for small H only. fp32
    always stores, so that its products are cuBLAS's, with TF32 where PyTorch is told so.
    """
    if dtype == torch.float32 or hidden_size > 256:
        return "store"
    return "recompute"


def _tile(head: Head) -> Tile:
    """Choose the largest tile that needs no more registers than there are."""
    if head.dtype == torch.float32 or head.hidden.shape[1] % 64:
        return Tile(64, 64, 32, 4, 2)
    stages = 4 if dispatch.capability(head.hidden.device) >= (9, 0) else 3
    plain = head.softcap is None and head.bias is None
    return Tile(128 if plain else 64, 128, 64, 8, stages)


# --- logits: what both ways share ------------------------------------------------------------------------------------


@triton.jit
def _tanh(x):
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def _capped(u, softcap, CAPPED: tl.constexpr):
    if CAPPED:
        u = softcap * _tanh(u / softcap)
    return u


@triton.jit
def _uncapped_gradient(dz, z, softcap, CAPPED: tl.constexpr):
    if CAPPED:
        dz *= 1.0 - (z / softcap) * (z / softcap)
    return dz


@triton.jit
def _softmax_gradient(z, lse, is_target, scale, of_softmax, smoothing, num_classes):
    """Return dz of logits within the softmax; `of_softmax` is scale * (1 + 2 z_loss lse)."""
    of_target = tl.where(is_target, scale * (1.0 - smoothing), 0.0)
    return of_softmax * tl.exp(z - lse) - of_target - scale * (smoothing / num_classes)


@triton.jit
def _row_loss(lse, target, sum_z, z_loss, smoothing, num_classes):
    return lse - (1.0 - smoothing) * target - smoothing / num_classes * sum_z + z_loss * lse * lse


# --- store -----------------------------------------------------------------------------------------------------------


@triton.jit
def _stored_kernel(
    Z, Y, LSE, LOSS, CORRECT,
    z_row, num_columns, num_classes, z_loss, smoothing, softcap,
    CAPPED: tl.constexpr, SMOOTHED: tl.constexpr, WITH_GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Turn one row of logits into dz, in place, for an incoming gradient of 1."""
    row = tl.program_id(0)
    Z += row.to(tl.int64) * z_row
    y = tl.load(Y + row).to(tl.int32)
    if y < 0:
        tl.store(LSE + row, 0.0)
        tl.store(LOSS + row, 0.0)
        tl.store(CORRECT + row, 0)
        if WITH_GRAD:
            for start in range(0, num_columns, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                tl.store(Z + columns, tl.zeros((BLOCK,), Z.dtype.element_ty), mask=columns < num_columns)
        return
    target = _capped(tl.load(Z + y).to(tl.float32), softcap, CAPPED)
    top, total, sum_z, beaten = -float("inf"), 0.0, 0.0, 0
    for start in range(0, num_classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < num_classes
        z = _capped(tl.load(Z + columns, mask=inside, other=0.0).to(tl.float32), softcap, CAPPED)
        if SMOOTHED:
            sum_z += tl.sum(tl.where(inside, z, 0.0), 0)
        z = tl.where(inside, z, -float("inf"))
        higher = tl.maximum(top, tl.max(z, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher), 0)
        top = higher
        beaten += tl.sum(((z > target) | ((z == target) & (columns < y))).to(tl.int32), 0)
    lse = top + tl.log(total)
    tl.store(LSE + row, lse)
    tl.store(LOSS + row, _row_loss(lse, target, sum_z, z_loss, smoothing, num_classes))
    tl.store(CORRECT + row, tl.where(beaten == 0, 1, 0))
    if WITH_GRAD:
        for start in range(0, num_columns, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < num_classes
            z = _capped(tl.load(Z + columns, mask=inside, other=0.0).to(tl.float32), softcap, CAPPED)
            dz = _softmax_gradient(z, lse, columns == y, 1.0, 1.0 + 2.0 * z_loss * lse, smoothing, num_classes)
            dz = tl.where(inside, _uncapped_gradient(dz, z, softcap, CAPPED), 0.0)
            tl.store(Z + columns, dz.to(Z.dtype.element_ty), mask=columns < num_columns)


Gradients = tuple[Tensor, Tensor, Tensor | None]  # dx, dW and db


def store(head: Head, with_grad: bool) -> tuple[Tensor, Tensor, Tensor, Gradients | None]:
    """Return loss, logsumexp, number of correct rows, and the gradients for an incoming gradient of 1."""
    x, weight, bias, targets = head.labelled_hidden(), head.contiguous_weight(), _bias(head), head.targets
    num_rows, num_columns = len(x), len(weight)
    loss, lse = x.new_empty(2, num_rows, dtype=torch.float32).unbind(0)
    correct = targets.new_empty(num_rows, dtype=torch.int32)
    dx = torch.empty_like(x) if with_grad else x.new_empty(0)
    dw = torch.empty_like(weight, dtype=torch.float32) if with_grad else x.new_empty(0)
    db = x.new_zeros(num_columns if with_grad and bias is not None else 0, dtype=torch.float32)
    size = _chunk_rows(num_rows, weight)
    buffer = x.new_empty(size, num_columns)
    for start in range(0, num_rows, size):
        rows = slice(start, min(start + size, num_rows))
        z = buffer[: rows.stop - start]
        if bias is None:
            torch.mm(x[rows], weight.T, out=z)
        else:
            torch.addmm(bias, x[rows], weight.T, out=z)
        _stored_kernel[(len(z),)](
            z, targets[rows], lse[rows], loss[rows], correct[rows],
            z.stride(0), num_columns, head.num_classes, head.z_loss, head.label_smoothing, head.softcap or 1.0,
            CAPPED=head.softcap is not None, SMOOTHED=head.label_smoothing > 0, WITH_GRAD=with_grad,
            BLOCK=min(triton.next_power_of_2(num_columns), _MAX_STORED_BLOCK), num_warps=16,
        )  # fmt: skip
        if with_grad:
            torch.mm(z, weight, out=dx[rows])
            _product(dw, z.T, x[rows], add=start > 0)
            if bias is not None:
                db += z.sum(0, dtype=torch.float32)
    if not with_grad:
        return loss.sum(), lse, correct.sum(), None
    of_bias = None if head.bias is None else db.to(head.bias.dtype)
    return loss.sum(), lse, correct.sum(), (dx.to(head.hidden.dtype), dw.to(head.weight.dtype), of_bias)


def _chunk_rows(num_rows: int, weight: Tensor) -> int:
    """Return the rows of a chunk, about equally many in each: what half an fp32 dW and _BUFFER_BYTES hold."""
    limit = (_BUFFER_BYTES + 2 * weight.numel()) // (len(weight) * weight.dtype.itemsize)
    chunks = -(-num_rows // max(limit // 128 * 128, 128))
    return min(num_rows, -(-num_rows // chunks // 128) * 128)


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


# --- recompute -------------------------------------------------------------------------------------------------------


@triton.jit
def _logits(
    X, W, B, rows, columns, x_row, w_row, hidden_size, softcap,
    BIASED: tl.constexpr, CAPPED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    WHOLE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Return the fp32 logits of a tile (ROWS, COLUMNS). WHOLE: H is a multiple of DEPTH."""
    depth = tl.arange(0, DEPTH)
    X += rows.to(tl.int64)[:, None] * x_row + depth[None, :]
    W += columns.to(tl.int64)[None, :] * w_row + depth[:, None]
    u = tl.zeros((ROWS, COLUMNS), tl.float32)
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
    return _capped(u, softcap, CAPPED)


@triton.jit
def _forward_kernel(
    X, W, B, Y, TOP, TOTAL, TARGET, BEFORE, SUM,
    num_rows, num_classes, hidden_size, x_row, w_row, share, softcap,
    BIASED: tl.constexpr, CAPPED: tl.constexpr, SMOOTHED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, WHOLE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write what a share of the columns says of each row: outputs are (S, M)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * share
    y = tl.load(Y + rows, mask=rows < num_rows, other=-1).to(tl.int32)
    if tl.max(y, 0) < 0:
        return
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    before = tl.full((ROWS,), -float("inf"), tl.float32)  # largest logit of the columns before the target
    total, target, sum_z = tl.zeros_like(top), tl.zeros_like(top), tl.zeros_like(top)
    for start in range(first, tl.minimum(first + share, num_classes), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        z = _logits(
            X, W, B, tl.minimum(rows, num_rows - 1), tl.minimum(columns, num_classes - 1), x_row, w_row, hidden_size,
            softcap, BIASED, CAPPED, ROWS, COLUMNS, DEPTH, WHOLE, INTERPRETED,
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
    places = tl.program_id(1).to(tl.int64) * num_rows + rows
    tl.store(TOP + places, top, mask=rows < num_rows)
    tl.store(TOTAL + places, total, mask=rows < num_rows)
    tl.store(TARGET + places, target, mask=rows < num_rows)
    tl.store(BEFORE + places, before, mask=rows < num_rows)
    if SMOOTHED:
        tl.store(SUM + places, sum_z, mask=rows < num_rows)


@triton.jit
def _join_kernel(
    Y, TOP, TOTAL, TARGET, BEFORE, SUM, LSE, LOSS, CORRECT,
    num_rows, num_classes, shares, z_loss, smoothing,
    SMOOTHED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Join the shares of each row, in their order."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    labelled = tl.load(Y + rows, mask=rows < num_rows, other=-1) >= 0
    top = tl.full((BLOCK,), -float("inf"), tl.float32)
    before = tl.full((BLOCK,), -float("inf"), tl.float32)
    total, target, sum_z = tl.zeros_like(top), tl.zeros_like(top), tl.zeros_like(top)
    for share in range(shares):
        places = share * num_rows + rows
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
    loss = _row_loss(lse, target, sum_z, z_loss, smoothing, num_classes)
    correct = labelled & (target >= top) & (target > before)
    tl.store(LSE + rows, tl.where(labelled, lse, 0.0), mask=rows < num_rows)
    tl.store(LOSS + rows, tl.where(labelled, loss, 0.0), mask=rows < num_rows)
    tl.store(CORRECT + rows, correct.to(tl.int32), mask=rows < num_rows)


def forward(head: Head) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, logsumexp and number of correct rows."""
    x, weight, bias, targets = head.labelled_hidden(), head.contiguous_weight(), _bias(head), head.targets
    smoothed = head.label_smoothing > 0
    num_rows, tile = len(x), _tile(head)
    row_tiles, column_tiles = triton.cdiv(num_rows, tile.rows), triton.cdiv(head.num_classes, tile.columns)
    share = triton.cdiv(column_tiles, min(triton.cdiv(_PROGRAMS, row_tiles), column_tiles))  # tiles of each program
    shares = triton.cdiv(column_tiles, share)
    partial = x.new_empty(5 if smoothed else 4, shares, num_rows, dtype=torch.float32)
    parts = [*partial.unbind(0), *([] if smoothed else [None])]
    _forward_kernel[(row_tiles, shares)](
        x, weight, bias, targets, *parts,
        num_rows, head.num_classes, x.shape[1], x.stride(0), weight.stride(0), share * tile.columns,
        head.softcap or 1.0, SMOOTHED=smoothed, **_constants(head, tile),
    )  # fmt: skip
    loss, lse = x.new_empty(2, num_rows, dtype=torch.float32).unbind(0)
    correct = targets.new_empty(num_rows, dtype=torch.int32)
    _join_kernel[(triton.cdiv(num_rows, 128),)](
        targets, *parts, lse, loss, correct, num_rows, head.num_classes, shares, head.z_loss, head.label_smoothing,
        SMOOTHED=smoothed, BLOCK=128,
    )  # fmt: skip
    return loss.sum(), lse, correct.sum()


@triton.jit
def _dz_kernel(
    X, W, B, Y, LSE, GRAD, DZ, DB,
    num_rows, num_classes, hidden_size, x_row, w_row, dz_row, first, z_loss, smoothing, softcap,
    BIASED: tl.constexpr, CAPPED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    WHOLE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write a tile of dz (M, dz_row), of columns from `first` on, and its sums over the rows of the tile.

    dz has whole tiles of columns; what stands in columns after the last class is not used.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    local = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    columns = first + local
    y = tl.load(Y + rows, mask=rows < num_rows, other=-1).to(tl.int32)
    places = rows.to(tl.int64)[:, None] * dz_row + local[None, :]
    inside = (rows < num_rows)[:, None]
    if tl.max(y, 0) < 0:
        tl.store(DZ + places, tl.zeros((ROWS, COLUMNS), DZ.dtype.element_ty), mask=inside)
        if BIASED:
            tl.store(DB + tl.program_id(0) * dz_row + local, tl.zeros((COLUMNS,), tl.float32))
        return
    z = _logits(
        X, W, B, tl.minimum(rows, num_rows - 1), tl.minimum(columns, num_classes - 1), x_row, w_row, hidden_size,
        softcap, BIASED, CAPPED, ROWS, COLUMNS, DEPTH, WHOLE, INTERPRETED,
    )  # fmt: skip
    lse = tl.load(LSE + rows, mask=y >= 0, other=0.0)
    scale = tl.where(y >= 0, tl.load(GRAD).to(tl.float32), 0.0)
    is_target = columns[None, :] == y[:, None]
    of_softmax = scale * (1.0 + 2.0 * z_loss * lse)
    lse = tl.where(y >= 0, lse, float("inf"))  # exp(z) might be infinite
    dz = _softmax_gradient(z, lse[:, None], is_target, scale[:, None], of_softmax[:, None], smoothing, num_classes)
    dz = _uncapped_gradient(dz, z, softcap, CAPPED)
    tl.store(DZ + places, dz.to(DZ.dtype.element_ty), mask=inside)
    if BIASED:
        tl.store(DB + tl.program_id(0) * dz_row + local, tl.sum(dz, 0))


def backward(head: Head, grad: Tensor, lse: Tensor) -> Gradients:
    """Return the gradients, times the incoming one."""
    x, weight, bias, tile = head.labelled_hidden(), head.contiguous_weight(), _bias(head), _tile(head)
    dx, dw = (
        torch.empty_like(x, dtype=torch.float32),
        torch.empty(weight.shape, dtype=head.weight.dtype, device=x.device),
    )
    db = None if head.bias is None else torch.zeros_like(head.bias)
    size = min(max(_BUFFER_BYTES // (len(x) * x.itemsize), _MIN_COLUMNS), head.num_classes)
    size = triton.cdiv(size, tile.columns) * tile.columns
    row_tiles, buffer = triton.cdiv(len(x), tile.rows), x.new_empty(len(x), size)
    sums = None if bias is None else x.new_empty(row_tiles, size, dtype=torch.float32)
    for start in range(0, head.num_classes, size):
        columns = slice(start, min(start + size, head.num_classes))
        dz = buffer[:, : columns.stop - start]
        _dz_kernel[(row_tiles, triton.cdiv(dz.shape[1], tile.columns))](
            x, weight, bias, head.targets, lse, grad, dz, sums,
            len(x), head.num_classes, x.shape[1], x.stride(0), weight.stride(0), size, start,
            head.z_loss, head.label_smoothing, head.softcap or 1.0, **_constants(head, tile),
        )  # fmt: skip
        _product(dx, dz, weight[columns], add=start > 0)
        _product(dw[columns], dz.T, x, add=False)
        if db is not None and sums is not None:
            db[columns] = sums[:, : dz.shape[1]].sum(0)
    dw[head.num_classes :] = 0
    return dx.to(head.hidden.dtype), dw, db


def _bias(head: Head) -> Tensor | None:
    return None if head.bias is None else head.bias.to(head.dtype)


def _constants(head: Head, tile: Tile) -> dict[str, int | bool]:
    return {
        "BIASED": head.bias is not None,
        "CAPPED": head.softcap is not None,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "DEPTH": tile.depth,
        "WHOLE": head.hidden.shape[1] % tile.depth == 0,
        "INTERPRETED": os.environ.get("TRITON_INTERPRET") == "1",
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def _product(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """Write a b into `out`, or add it; `out` has the dtype of a and b, or is fp32."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, out=out, beta=int(add))
    elif out.device.type == "cpu":  # in tests; no mixed product exists there
        out.copy_(out + a.float() @ b.float() if add else a.float() @ b.float())
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out, beta=int(add))
