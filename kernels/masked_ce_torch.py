"""`masked_ce` in PyTorch alone: for the CPU, for fp64, and for CUDA without Triton.

The columns go through in chunks that stay in the cache, once for logsumexp and loss, once more in the backward pass
for the gradients, into which the incoming gradient is folded. The logits are kept for that second pass where they cost
nothing, in the memory of dW, each chunk of dW being written over the logits that gave it; or, for more positions,
in memory of their own of up to ``_MAX_KEPT_BYTES``; else they are computed again.

Shapes: M positions, H hidden size, V vocabulary, C classes inside the softmax, n columns of a chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from enc.kernels.tensors import at_least_fp32

_MAX_KEPT_BYTES = 2**27
_CHUNK_LOGITS = {8: 2**18, 4: 2**19, 2: 2**18}  # by bytes of a logit; in 16 bits oneDNN takes scratch of its own
_MIN_CHUNK, _MAX_CHUNK = 512, 4096


class Head(NamedTuple):
    """The arguments of `masked_ce`."""

    hidden: Tensor  # (M, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    targets: Tensor  # (M,), negative in ignored positions
    dtype: torch.dtype  # of the matmuls
    num_classes: int
    z_loss: float
    label_smoothing: float
    softcap: float | None

    @property
    def accumulator(self) -> torch.dtype:
        return at_least_fp32(self.dtype)

    def labelled_hidden(self) -> Tensor:
        """Return x in the dtype of the matmuls, zero in ignored positions, whatever they hold. (M, H)"""
        return self.hidden.to(self.dtype).masked_fill((self.targets < 0)[:, None], 0).contiguous()

    def contiguous_weight(self) -> Tensor:
        """Return W in the dtype of the matmuls, itself if it is so already."""
        return self.weight.to(self.dtype).contiguous()

    def matmul_bias(self) -> Tensor | None:
        """Return b in the dtype of the matmuls."""
        return None if self.bias is None else self.bias.to(self.dtype)


def forward(head: Head, with_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return loss, logsumexp (M,), number of correct positions, and for the backward pass the logits, if they fit."""
    kept = _room_for_logits(head) if with_grad else None
    labelled = head.targets >= 0  # (M,)
    x, y = head.labelled_hidden(), head.targets.clamp(min=0)  # (M, H), (M,)
    top = x.new_full((len(x), 1), -torch.inf, dtype=head.accumulator)  # largest logit so far
    total, sum_z, target = torch.zeros_like(top), torch.zeros_like(top), torch.zeros_like(top)
    best = torch.zeros_like(top, dtype=torch.bool)  # whether the target is the first of the largest so far
    for chunk in _chunks(head, y, kept):
        _logits(head, x, chunk)
        z = chunk.widened()
        largest = z.amax(1, keepdim=True)
        best &= largest <= top
        if len(chunk.positions):
            own, places = z[chunk.positions], chunk.places[:, None]
            target[chunk.positions] = own.gather(1, places)
            best[chunk.positions] = (own.argmax(1, keepdim=True) == places) & (largest > top)[chunk.positions]
        if head.label_smoothing:
            sum_z += z.sum(1, keepdim=True)
        higher = torch.maximum(top, largest)
        part = torch.sub(z, higher, out=chunk.wide).exp_().sum(1, keepdim=True)
        total, top = total * (top - higher).exp() + part, higher
    lse = top + total.log()
    loss = lse - (1 - head.label_smoothing) * target - head.label_smoothing / head.num_classes * sum_z
    loss += head.z_loss * lse.square()
    loss, lse = (t[:, 0].masked_fill(~labelled, 0) for t in (loss, lse))
    return loss.sum(), lse, (best[:, 0] & labelled).sum(), kept


def backward(head: Head, grad: Tensor, lse: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return dx, dW, perhaps written over the kept logits, and db."""
    if kept is not None and (kept.shape, kept.dtype) == (head.weight.shape, head.weight.dtype):
        dw = kept
    else:
        dw = torch.empty_like(head.weight, memory_format=torch.contiguous_format)
    labelled, y = head.targets >= 0, head.targets.clamp(min=0)  # (M,)
    x, lse = head.labelled_hidden(), lse[:, None]
    scale = torch.where(labelled, grad, 0).to(lse.dtype)[:, None]  # (M, 1)
    dx, own = torch.zeros_like(x, dtype=lse.dtype), torch.zeros_like(lse)
    db = None if head.bias is None else torch.zeros_like(head.bias)
    for chunk in _chunks(head, y, kept):
        if kept is None:
            _logits(head, x, chunk)
        dz = _logits_gradient(head, chunk, lse, scale)
        if db is not None:
            db[chunk.columns] = dz.sum(0)
        w = head.weight[chunk.columns].to(head.dtype)
        if dz.dtype == head.dtype:
            dx.addmm_(dz, w)
            _product(dz.T, x, out=dw[chunk.columns])
        else:
            _add_rounded(chunk, dz, w, x, dx, own, dw[chunk.columns])
    dw[head.num_classes :] = 0
    dx += own * head.weight[y].to(head.dtype)
    return dx.masked_fill_(~labelled[:, None], 0).to(head.hidden.dtype), dw, db


def _room_for_logits(head: Head) -> Tensor | None:
    """Return memory with room for M logits of each class: (V, H) to become dW, else (C, M) if that is not much."""
    num_positions, item = len(head.hidden), head.dtype.itemsize
    if num_positions * item <= head.weight.shape[1] * head.weight.dtype.itemsize:
        return torch.empty_like(head.weight, memory_format=torch.contiguous_format)
    if num_positions * head.num_classes * item <= _MAX_KEPT_BYTES:
        return head.weight.new_empty((head.num_classes, num_positions), dtype=head.dtype)
    return None


@dataclass(frozen=True)
class _Chunk:
    """Some columns, and the positions whose target is among them."""

    columns: slice
    positions: Tensor
    places: Tensor  # of their targets in the chunk
    logits: Tensor  # (M, n) in the dtype of the matmuls: where they are kept, or `low`
    wide: Tensor  # (M, n) scratch of the accumulator's dtype
    low: Tensor  # (M, n) scratch of the matmuls' dtype

    def widened(self) -> Tensor:
        """Return the logits in the accumulator's dtype, perhaps in `wide`."""
        # A difference of bf16 and fp32 is slower than a copy and a difference.
        return self.logits if self.logits.dtype == self.wide.dtype else self.wide.copy_(self.logits)


def _chunks(head: Head, y: Tensor, kept: Tensor | None) -> Iterator[_Chunk]:
    num_positions = len(y)
    size = _CHUNK_LOGITS[head.dtype.itemsize] // max(num_positions, 1) // 256 * 256
    size = min(max(size, _MIN_CHUNK), _MAX_CHUNK, head.num_classes)
    # Reused: fresh memory costs more than the arithmetic.
    wide, low = (y.new_empty(num_positions * size, dtype=dtype) for dtype in (head.accumulator, head.dtype))
    order = y.argsort(stable=True)
    starts = range(0, head.num_classes, size)
    bounds = torch.searchsorted(y[order], torch.tensor([*starts, head.num_classes], device=y.device)).tolist()
    for start, first, last in zip(starts, bounds, bounds[1:], strict=False):
        columns, positions = slice(start, min(start + size, head.num_classes)), order[first:last]
        shape = num_positions, columns.stop - start
        logits = low if kept is None else kept[columns].view(-1).view(head.dtype)
        memory = (_front(scratch, shape) for scratch in (logits, wide, low))
        yield _Chunk(columns, positions, y[positions] - start, *memory)


def _front(memory: Tensor, shape: tuple[int, int]) -> Tensor:
    return memory[: shape[0] * shape[1]].view(shape)


def _logits(head: Head, x: Tensor, chunk: _Chunk) -> None:
    """Write the logits of a chunk."""
    w, out = head.weight[chunk.columns].to(head.dtype), chunk.logits
    if head.bias is None:
        torch.mm(x, w.T, out=out)
    else:
        torch.addmm(head.bias[chunk.columns].to(head.dtype), x, w.T, out=out)
    if head.softcap is not None:
        out.div_(head.softcap).tanh_().mul_(head.softcap)


def _logits_gradient(head: Head, chunk: _Chunk, lse: Tensor, scale: Tensor) -> Tensor:
    """Return du of a chunk (M, n), in its `wide`; ``scale`` (M, 1) is the incoming gradient, 0 in ignored positions."""
    dz = torch.sub(chunk.widened(), lse, out=chunk.wide).exp_().mul_(scale * (1 + 2 * head.z_loss * lse))
    of_target = (scale * (head.label_smoothing - 1))[:, 0]
    dz.index_put_((chunk.positions, chunk.places), of_target[chunk.positions], accumulate=True)
    if head.label_smoothing:
        dz -= scale * head.label_smoothing / head.num_classes
    if head.softcap is not None:
        dz *= 1 - (chunk.logits / head.softcap).square()
    return dz


def _add_rounded(chunk: _Chunk, dz: Tensor, w: Tensor, x: Tensor, dx: Tensor, own: Tensor, dw: Tensor) -> None:
    """Add dz w to dx and write dz^T x to dw, by products in 16 bits; ``own`` gets what each target adds to its dx."""
    # Chunks of dx are rounded to bf16, so the targets' own part, which may be most of it, is left out of them.
    targets = chunk.positions, chunk.places
    own[chunk.positions, 0] = dz[targets]
    low = chunk.low.copy_(dz.index_put_(targets, dz.new_zeros(())))
    dx += low @ w
    low.index_put_(targets, own[chunk.positions, 0].to(low.dtype))
    # From here on the chunk's logits are gone. The CPU's bf16 kernel is slow on a transposed view.
    low = _front(chunk.wide.view(-1).view(low.dtype), (low.shape[1], low.shape[0])).copy_(low.T)
    _product(low, x, out=dw)


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write a b, rounded to the dtype of ``out``."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)
