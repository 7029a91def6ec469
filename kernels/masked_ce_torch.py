"""`masked_ce` in PyTorch alone: for the CPU, for fp64, and for CUDA without Triton.

The columns go through in chunks that stay in the cache, once for logsumexp and loss, once more in the backward pass
for the gradients, into which the incoming gradient is folded. The logits are kept for that second pass where they cost
nothing, in the memory of dW, each chunk of dW being written over the logits that gave it; or, for more rows, in
memory of their own of up to ``_MAX_KEPT_BYTES``; else they are computed again.

Shapes: M rows, H hidden size, V rows of the weight, C classes inside the softmax, n columns of a chunk.
"""

import ctypes
import mmap
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_MAX_KEPT_BYTES = 2**27
_CHUNK_LOGITS = 2**19
_MIN_CHUNK, _MAX_CHUNK = 512, 4096
_HUGE_PAGE = 2**21


class Head(NamedTuple):
    """The arguments of `masked_ce`."""

    hidden: Tensor  # (M, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    targets: Tensor  # (M,), negative in ignored rows
    dtype: torch.dtype  # of the matmuls
    num_classes: int
    z_loss: float
    label_smoothing: float
    softcap: float | None

    @property
    def accumulator(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    def labelled_hidden(self) -> Tensor:
        """Return x in the dtype of the matmuls, zero in ignored rows, whatever they hold. (M, H)"""
        return self.hidden.to(self.dtype).masked_fill((self.targets < 0)[:, None], 0).contiguous()

    def contiguous_weight(self) -> Tensor:
        """Return W in the dtype of the matmuls, itself if it is so already."""
        return self.weight.to(self.dtype).contiguous()


def room_for_logits(head: Head) -> Tensor:
    """Return memory whose rows have room for M logits each: (V, H) to become dW, else (C, M), or an empty tensor."""
    rows, item = len(head.hidden), head.dtype.itemsize
    if rows * item <= head.weight.shape[1] * head.weight.dtype.itemsize:
        return torch.empty_like(head.weight, memory_format=torch.contiguous_format)
    if rows * head.num_classes * item <= _MAX_KEPT_BYTES:
        return head.weight.new_empty((head.num_classes, rows), dtype=head.dtype)
    return head.weight.new_empty(0)


def forward(head: Head, kept: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, logsumexp (M,) and number of correct rows; keep the logits if there is room."""
    labelled = head.targets >= 0  # (M,)
    x, y = head.labelled_hidden(), head.targets.clamp(min=0)[:, None]  # (M, H), (M, 1)
    top = torch.full_like(y, -torch.inf, dtype=head.accumulator)  # largest logit so far
    total, target, sum_z = torch.zeros_like(top), torch.zeros_like(top), torch.zeros_like(top)
    best = torch.zeros_like(y, dtype=torch.bool)  # whether the target is the first of the largest so far
    for columns, z, wide, _ in _chunks(head, kept):
        _logits(head, x, columns, z)
        largest = z.amax(1, keepdim=True).to(wide.dtype)
        best &= largest <= top
        rows = _rows_with_target(y[:, 0], columns)
        place = y[rows] - columns.start
        target[rows] = z[rows].gather(1, place).to(wide.dtype)
        best[rows] = (z[rows].argmax(1, keepdim=True) == place) & (target[rows] > top[rows])
        higher = torch.maximum(top, largest)
        total = total * (top - higher).exp() + wide.copy_(z).sub_(higher).exp_().sum(1, keepdim=True)
        top = higher
        if head.label_smoothing:
            sum_z += z.sum(1, keepdim=True, dtype=wide.dtype)
    lse = top + total.log()
    loss = lse - (1 - head.label_smoothing) * target - head.label_smoothing / head.num_classes * sum_z
    loss += head.z_loss * lse.square()
    loss, lse = (t[:, 0].masked_fill(~labelled, 0) for t in (loss, lse))
    return loss.sum(), lse, (best[:, 0] & labelled).sum()


def backward(head: Head, grad: Tensor, lse: Tensor, kept: Tensor | None, dw: Tensor) -> tuple[Tensor, Tensor]:
    """Write dW, perhaps over the kept logits; return dx, and db or an empty tensor."""
    labelled, y = head.targets >= 0, head.targets.clamp(min=0)  # (M,)
    x, lse = head.labelled_hidden(), lse[:, None]
    scale = torch.where(labelled, grad, 0).to(lse.dtype)[:, None]  # (M, 1)
    of_softmax, of_target = scale * (1 + 2 * head.z_loss * lse), (scale * (head.label_smoothing - 1))[:, 0]
    of_all = scale * head.label_smoothing / head.num_classes
    dx = torch.zeros_like(x, dtype=lse.dtype)
    db = dw.new_empty(0) if head.bias is None else head.bias.new_zeros(len(head.bias))
    for columns, z, dz, low in _chunks(head, kept):
        if kept is None:
            _logits(head, x, columns, z)
        dz.copy_(z).sub_(lse).exp_().mul_(of_softmax)
        rows = _rows_with_target(y, columns)
        place = y[rows] - columns.start
        dz[rows, place] += of_target[rows]
        if head.label_smoothing:
            dz -= of_all
        if head.softcap is not None:
            dz *= 1 - (z / head.softcap).square()
        if head.bias is not None:
            db[columns] = dz.sum(0)
        # The targets' own part of dx, often most of it, is added in fp32: the products of chunks are rounded to bf16.
        own, w = dz[rows, place], head.weight[columns].to(head.dtype)
        dz[rows, place] = 0
        dz = dz if dz.dtype == head.dtype else low.copy_(dz)
        dx.addmm_(dz, w) if dx.dtype == w.dtype else dx.add_(dz @ w)
        dx[rows] += own[:, None] * w[place]
        dz[rows, place] = own.to(dz.dtype)
        _write_transposed_product(dw[columns], dz, x)  # from here on the chunk's logits are gone
    dw[head.num_classes :] = 0
    return dx.masked_fill_(~labelled[:, None], 0).to(head.hidden.dtype), db


def on_huge_pages(memory: Tensor) -> Tensor:
    """Ask for huge pages under fresh memory on the CPU: faults on small ones would take a tenth of the whole call."""
    if memory.device.type == "cpu" and sys.platform == "linux" and memory.nbytes >= 2 * _HUGE_PAGE:
        start = -(-memory.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = memory.data_ptr() + memory.nbytes - start
        # Advice: where it is not taken nothing changes.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
    return memory


def _chunks(head: Head, kept: Tensor | None) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Yield columns and three (M, n): their logits, where they are kept or in scratch, and scratch of both dtypes."""
    rows = len(head.hidden)
    size = _CHUNK_LOGITS // max(rows, 1) // 256 * 256
    size = min(max(size, _MIN_CHUNK), _MAX_CHUNK, head.num_classes)
    # Reused: fresh memory costs more than the arithmetic.
    wide, low = (head.hidden.new_empty(rows * size, dtype=dtype) for dtype in (head.accumulator, head.dtype))
    for start in range(0, head.num_classes, size):
        columns = slice(start, min(start + size, head.num_classes))
        shape = rows, columns.stop - start
        logits = low if kept is None else kept[columns].view(-1).view(head.dtype)
        yield columns, _front(logits, shape), _front(wide, shape), _front(low, shape)


def _front(memory: Tensor, shape: tuple[int, int]) -> Tensor:
    return memory[: shape[0] * shape[1]].view(shape)


def _logits(head: Head, x: Tensor, columns: slice, out: Tensor) -> None:
    w = head.weight[columns].to(head.dtype)
    if head.bias is None:
        torch.mm(x, w.T, out=out)
    else:
        torch.addmm(head.bias[columns].to(head.dtype), x, w.T, out=out)
    if head.softcap is not None:
        out.div_(head.softcap).tanh_().mul_(head.softcap)


def _rows_with_target(y: Tensor, columns: slice) -> Tensor:
    return ((y >= columns.start) & (y < columns.stop)).nonzero()[:, 0]


def _write_transposed_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Write a^T b; the CPU's bf16 kernel is slow on a transposed view."""
    a = a.T if a.dtype in (torch.float32, torch.float64) else a.T.contiguous()
    torch.mm(a, b, out=out) if out.dtype == a.dtype else out.copy_(a @ b)
