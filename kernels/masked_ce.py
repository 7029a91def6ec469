"""Language-model head and cross-entropy in one, over the labelled rows only, without the full logits in fp32.

For hidden x (M, H), weight W (V, H), bias b (V,) and targets y (M,), over the first C = num_valid_classes columns::

    u = x W^T + b           z = c tanh(u / c) with a softcap c, else u           lse_i = log sum_{j < C} exp(z_ij)

With label smoothing e (arXiv 1512.00567) and z-loss weight k (arXiv 2204.02311, section 5), for the labelled rows::

    loss  = sum_i lse_i - (1 - e) z_{i, y_i} - (e / C) sum_{j < C} z_ij + k lse_i^2
    dz_ij = (1 + 2 k lse_i) exp(z_ij - lse_i) - (1 - e) [j = y_i] - e / C
    du    = dz (1 - (z / c)^2)       dx = du W       dW = du^T x       db_j = sum_i du_ij

The torch path below serves the CPU. It goes over the columns in chunks that stay in the cache, once for logsumexp and
loss, once more in the backward pass for the gradients, into which the incoming gradient is folded. The logits are kept
for that second pass where they cost nothing, in the memory of dW, each chunk of dW being written over the logits that
gave it; or, for more rows, in ``_MAX_KEPT_BYTES``; else they are computed again.

Shapes: M rows, H hidden size, V rows of the weight, C classes inside the softmax, n columns of a chunk.
"""

import ctypes
import mmap
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
_MAX_KEPT_BYTES = 2**27
_CHUNK_LOGITS = 2**19
_HUGE_PAGE = 2**21
_MIN_CHUNK, _MAX_CHUNK = 512, 4096


class MaskedCE(NamedTuple):
    """What `masked_ce` returns."""

    loss: Tensor  # () a sum, fp32
    logsumexp: Tensor  # (M,) fp32, without gradient, 0 in ignored rows
    num_correct: Tensor  # () int64: rows whose best class is the target


class Terms(NamedTuple):
    """What enters the loss beside the tensors."""

    num_classes: int
    z_loss: float
    label_smoothing: float
    softcap: float | None


def masked_ce(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    num_valid_classes: int | None = None,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
) -> MaskedCE:
    """Sum the cross-entropy of the labelled rows and count the rows whose best class is the target.

    The matmuls run in the autocast dtype under autocast, else in the dtype of ``hidden``; logsumexp, loss and the
    sums over chunks are fp32 (fp64 for fp64 inputs) always.

    Args:
        hidden: (M, H). M may be 0.
        weight: (V, H).
        bias: (V,) or None.
        targets: (M,) int64 classes below ``num_valid_classes``; -100 leaves a row out.
        num_valid_classes: Columns from here on are vocabulary padding, outside of the softmax, with zero gradient.
        z_loss: Weight of the squared logsumexp of each row.
        label_smoothing: Share of the target's probability that is spread over all valid classes.
        softcap: Bound of the logits, by a tanh.

    Returns:
        Loss, logsumexp and number of correct rows. Without a labelled row all are 0 and the gradients are zero.

    Raises:
        RuntimeError: A target is neither -100 nor one of the classes.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    num_classes = len(weight) if num_valid_classes is None else num_valid_classes
    in_range = (targets == IGNORED) | (targets >= 0) & (targets < num_classes)
    torch._assert_async(in_range.all(), f"every target must be {IGNORED} (ignored) or in 0..{num_classes - 1}")
    terms = Terms(num_classes, z_loss, label_smoothing, softcap)
    # torch.compile would unroll the chunks, so it gets an opaque operator; in eager mode that would load dynamo.
    forward = _forward_op if torch.compiler.is_compiling() else _MaskedCE.apply
    loss, lse, correct, _ = forward(hidden, weight, bias, targets, dtype, with_grad, *terms)
    return MaskedCE(loss, lse.detach(), correct)


def reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    num_valid_classes: int | None = None,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
) -> MaskedCE:
    """Compute the same from the full logits, in fp32, or fp64 for fp64 inputs."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logits = F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return from_logits(logits[:, :num_valid_classes], targets, z_loss, label_smoothing, softcap)


def from_logits(
    logits: Tensor, targets: Tensor, z_loss: float = 0.0, label_smoothing: float = 0.0, softcap: float | None = None
) -> MaskedCE:
    """Compute the loss of ready logits (M, C), in their dtype."""
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    lse = logits.logsumexp(-1).masked_fill(targets == IGNORED, 0)
    entropy = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum", label_smoothing=label_smoothing)
    correct = (logits.argmax(-1) == targets).sum()
    return MaskedCE(entropy + z_loss * lse.square().sum(), lse.detach(), correct)


def why_not(device: str, dtype: torch.dtype) -> str | None:
    """Say why the loss does not run at full speed on this device; None if it does."""
    return None if device == "cpu" else f"no fused head and loss for {dtype} on {device}: it runs in chunks of columns"


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    dtype: torch.dtype,
    with_grad: bool,
    num_classes: int,
    z_loss: float,
    label_smoothing: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return loss, logsumexp, number of correct rows, and the memory with the kept logits."""
    head = _Head(hidden, weight, bias, targets, dtype, Terms(num_classes, z_loss, label_smoothing, softcap))
    kept = _on_huge_pages(head.room_for_logits() if with_grad else weight.new_empty(0))
    with torch.autocast(hidden.device.type, enabled=False):
        loss, lse, correct = head.statistics(kept if kept.numel() else None)
    return loss, lse, correct, kept


def _backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lse: Tensor,
    logits: Tensor | None,
    dweight: Tensor,
    holds_logits: bool,
    dtype: torch.dtype,
    num_classes: int,
    z_loss: float,
    label_smoothing: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Write dW into ``dweight``, which may hold the logits; return dx, and db or an empty tensor."""
    head = _Head(hidden, weight, bias, targets, dtype, Terms(num_classes, z_loss, label_smoothing, softcap))
    with torch.autocast(hidden.device.type, enabled=False):
        return head.gradients(grad, lse, dweight if holds_logits else logits, _on_huge_pages(dweight))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    hidden, weight, bias, targets, ctx.dtype, _, *ctx.terms = inputs
    _, lse, correct, ctx.kept = output
    ctx.save_for_backward(hidden, weight, bias, targets, lse)
    ctx.mark_non_differentiable(lse, correct, ctx.kept)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, backward):  # type: ignore[no-untyped-def]
    if grad is None:
        return (None,) * 10
    hidden, weight, bias, targets, lse = ctx.saved_tensors
    # The first backward pass uses the logits up; another one computes them again.
    logits, ctx.kept = ctx.kept, None
    logits = logits if logits is not None and logits.numel() else None
    holds_logits = logits is not None and (logits.shape, logits.dtype) == (weight.shape, weight.dtype)
    dweight = logits if holds_logits else torch.empty_like(weight, memory_format=torch.contiguous_format)
    logits = None if holds_logits else logits
    dx, db = backward(grad, hidden, weight, bias, targets, lse, logits, dweight, holds_logits, ctx.dtype, *ctx.terms)
    return dx, dweight, None if bias is None else db, *[None] * 7


class _MaskedCE(torch.autograd.Function):
    forward = staticmethod(_forward)
    setup_context = staticmethod(_setup_context)

    @staticmethod
    def backward(ctx, grad, *_):  # type: ignore[no-untyped-def]
        return _differentiate(ctx, grad, _backward)


_forward_op = torch.library.custom_op("enc::masked_ce", _forward, mutates_args=())
_backward_op = torch.library.custom_op("enc::masked_ce_backward", _backward, mutates_args=("dweight",))
_forward_op.register_autograd(
    lambda ctx, grad, *_: _differentiate(ctx, grad, _backward_op), setup_context=_setup_context
)


@_forward_op.register_fake
def _(hidden, weight, bias, targets, dtype, with_grad, *terms):  # type: ignore[no-untyped-def]
    head = _Head(hidden, weight, bias, targets, dtype, Terms(*terms))
    kept = head.room_for_logits() if with_grad else weight.new_empty(0)
    return (
        hidden.new_empty((), dtype=head.acc),
        hidden.new_empty(len(hidden), dtype=head.acc),
        targets.new_empty(()),
        kept,
    )


@_backward_op.register_fake
def _(grad, hidden, weight, bias, *_):  # type: ignore[no-untyped-def]
    return hidden.new_empty(hidden.shape), weight.new_empty(0) if bias is None else bias.new_empty(len(bias))


class _Head:
    """The inputs of one call, and the two passes over the columns."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, dtype: torch.dtype, terms: Terms
    ) -> None:
        self.hidden, self.weight, self.bias, self.targets = hidden, weight, bias, targets
        self.dtype, self.terms = dtype, terms
        self.acc = torch.promote_types(dtype, torch.float32)

    def room_for_logits(self) -> Tensor:
        """Return memory with room for M logits in each row, (V, H) if it becomes dW; or an empty tensor."""
        rows, item = len(self.hidden), self.dtype.itemsize
        if rows * item <= self.weight.shape[1] * self.weight.dtype.itemsize:
            return torch.empty_like(self.weight, memory_format=torch.contiguous_format)
        if rows * self.terms.num_classes * item <= _MAX_KEPT_BYTES:
            return self.weight.new_empty((self.terms.num_classes, rows), dtype=self.dtype)
        return self.weight.new_empty(0)

    def statistics(self, kept: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return loss, logsumexp (M,) and number of correct rows; keep the logits if there is room."""
        labelled = self.targets != IGNORED  # (M,)
        x, y = self._labelled_hidden(), self.targets.masked_fill(~labelled, 0)[:, None]  # (M, H), (M, 1)
        top = torch.full_like(y, -torch.inf, dtype=self.acc)  # largest logit so far
        total, target, sum_z = torch.zeros_like(top), torch.zeros_like(top), torch.zeros_like(top)
        best = torch.zeros_like(y, dtype=torch.bool)  # whether the target is the first of the largest so far
        for columns, z, e, _ in self._chunks(kept):
            self._logits(x, columns, z)
            largest = z.amax(1, keepdim=True).to(self.acc)
            best &= largest <= top
            rows = ((y >= columns.start) & (y < columns.stop))[:, 0].nonzero()[:, 0]  # whose target is in this chunk
            place = y[rows] - columns.start
            target[rows] = z[rows].gather(1, place).to(self.acc)
            best[rows] = (z[rows].argmax(1, keepdim=True) == place) & (target[rows] > top[rows])
            higher = torch.maximum(top, largest)
            total = total * (top - higher).exp() + e.copy_(z).sub_(higher).exp_().sum(1, keepdim=True)
            top = higher
            if self.terms.label_smoothing:
                sum_z += z.sum(1, keepdim=True, dtype=self.acc)
        lse = top + total.log()
        smoothing = self.terms.label_smoothing
        loss = lse - (1 - smoothing) * target - smoothing / self.terms.num_classes * sum_z
        loss = loss + self.terms.z_loss * lse.square()
        loss, lse = (t[:, 0].masked_fill(~labelled, 0) for t in (loss, lse))
        return loss.sum(), lse, (best[:, 0] & labelled).sum()

    def gradients(self, grad: Tensor, lse: Tensor, kept: Tensor | None, dw: Tensor) -> tuple[Tensor, Tensor]:
        """Write dW; return dx, and db or an empty tensor."""
        _, z_loss, smoothing, softcap = self.terms
        labelled = self.targets != IGNORED
        y = self.targets.masked_fill(~labelled, 0)  # (M,)
        scale = torch.where(labelled, grad, 0).to(self.acc)[:, None]  # (M, 1)
        of_softmax, of_target = scale * (1 + 2 * z_loss * lse[:, None]), (scale * (smoothing - 1))[:, 0]
        of_all = scale * smoothing / self.terms.num_classes
        x, lse = self._labelled_hidden(), lse[:, None]
        dx = torch.zeros_like(x, dtype=self.acc)
        db = self.weight.new_empty(0) if self.bias is None else self.bias.new_zeros(len(self.bias))
        for columns, z, dz, low in self._chunks(kept):
            if kept is None:
                self._logits(x, columns, z)
            dz.copy_(z).sub_(lse).exp_().mul_(of_softmax)
            rows = ((y >= columns.start) & (y < columns.stop)).nonzero()[:, 0]
            place = y[rows] - columns.start
            dz[rows, place] += of_target[rows]
            if smoothing:
                dz -= of_all
            if softcap is not None:
                dz *= 1 - (z / softcap).square()
            if self.bias is not None:
                db[columns] = dz.sum(0)
            # The targets' own part of dx, often most of it, stays in fp32: products of chunks are rounded to bf16.
            own, w = dz[rows, place], self.weight[columns].to(self.dtype)
            dz[rows, place] = 0
            du = dz if self.dtype == self.acc else low.copy_(dz)
            _add_matmul(dx, du, w)
            dx[rows] += own[:, None] * w[place]
            du[rows, place] = own.to(du.dtype)
            _write_matmul(dw[columns], du, x)  # from here on the chunk's logits are gone
        dw[self.terms.num_classes :] = 0
        return dx.masked_fill_(~labelled[:, None], 0).to(self.hidden.dtype), db

    def _labelled_hidden(self) -> Tensor:
        """Return x in the dtype of the matmuls, zero in ignored rows, whatever they hold."""
        return self.hidden.to(self.dtype).masked_fill((self.targets == IGNORED)[:, None], 0)

    def _chunks(self, kept: Tensor | None) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Yield columns, their logits (M, n), where they are kept or in scratch, and scratch in ``acc`` and ``dtype``."""
        rows, classes = len(self.hidden), self.terms.num_classes
        size = min(max(_CHUNK_LOGITS // max(rows, 1) // 256 * 256, _MIN_CHUNK), _MAX_CHUNK, max(classes, 1))
        # Reused: fresh memory costs more than the arithmetic.
        wide, low = (self.hidden.new_empty(rows * size, dtype=t) for t in (self.acc, self.dtype))
        for start in range(0, classes, size):
            columns = slice(start, min(start + size, classes))
            shape = rows, columns.stop - start
            e, scratch = (_front(memory, shape) for memory in (wide, low))
            z = scratch if kept is None else _front(kept[columns].view(-1).view(self.dtype), shape)
            yield columns, z, e, scratch

    def _logits(self, x: Tensor, columns: slice, out: Tensor) -> None:
        w = self.weight[columns].to(self.dtype)
        if self.bias is None:
            torch.mm(x, w.T, out=out)
        else:
            torch.addmm(self.bias[columns].to(self.dtype), x, w.T, out=out)
        if self.terms.softcap is not None:
            out.div_(self.terms.softcap).tanh_().mul_(self.terms.softcap)


def _on_huge_pages(memory: Tensor) -> Tensor:
    """Ask for huge pages under fresh memory on the CPU: faults on small ones would take a tenth of the whole call."""
    if memory.device.type == "cpu" and sys.platform == "linux" and memory.nbytes >= 2 * _HUGE_PAGE:
        start = -(-memory.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = memory.data_ptr() + memory.nbytes - start
        # Advice: where it is not taken nothing changes.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
    return memory


def _front(memory: Tensor, shape: tuple[int, int]) -> Tensor:
    return memory[: shape[0] * shape[1]].view(shape)


def _add_matmul(out: Tensor, a: Tensor, b: Tensor) -> None:
    out.addmm_(a, b) if out.dtype == a.dtype else out.add_(a @ b)


def _write_matmul(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Write a^T b; the CPU's bf16 kernel is slow on a transposed view."""
    a = a.T if a.dtype in (torch.float32, torch.float64) else a.T.contiguous()
    torch.mm(a, b, out=out) if out.dtype == a.dtype else out.copy_(a @ b)
