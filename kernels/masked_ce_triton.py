"""`masked_ce` on CUDA, in Triton and cuBLAS: two methods, both deterministic, without atomics.

**store** (`masked_ce_triton_store.py`): The positions go through in chunks. cuBLAS makes the logits of a chunk, rounded
to the dtype of the matmuls as PyTorch's own would be, and one kernel turns them, in fp32 and in place, into loss,
logsumexp and dz; cuBLAS then makes dx and adds to dW in fp32. 6 M H V operations. The gradients exist after the forward
pass; the backward pass multiplies them by the incoming gradient, or leaves them alone where it is 1.

**recompute** (`masked_ce_triton_recompute.py`): Forward, a program owns a tile of positions and a share of the columns,
computes one fp32 tile of logits after the other, and keeps running maximum and sum of exponentials; another kernel
joins the shares in a fixed order. Only logsumexp is kept. Backward, the columns go through in chunks: a kernel computes
the fp32 logits again and writes dz of the chunk, with the incoming gradient in it; cuBLAS adds to dx in fp32 and writes
that part of dW, once. 8 M H V operations, fewer bytes a logit, no gradient between the passes.

Whatever is in fp32 between the two matmuls of a pass is exact to fp32; dz is rounded to the dtype of the matmuls.
Tiles without a labelled position do no work.

Shapes: M positions, H hidden size, V vocabulary, C classes inside the softmax, n columns of a chunk.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BUFFER_BYTES = 64 * 2**20  # of a chunk's logits

Gradients = tuple[Tensor, Tensor, Tensor | None]  # dx, dW and db


def method(hidden_size: int, dtype: torch.dtype) -> str:
    """Choose between "store" and "recompute".

    Storing takes about 10 bytes of traffic a logit, recomputing 2 H operations, which is less for small H only. fp32
    always stores, so that its products are cuBLAS's, with TF32 where PyTorch is told so.
    """
    if dtype == torch.float32 or hidden_size > 256:
        return "store"
    return "recompute"


@triton.jit
def _tanh(x):
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def capped(u, softcap, CAPPED: tl.constexpr):
    if CAPPED:
        u = softcap * _tanh(u / softcap)
    return u


@triton.jit
def uncapped_gradient(dz, z, softcap, CAPPED: tl.constexpr):
    if CAPPED:
        dz *= 1.0 - (z / softcap) * (z / softcap)
    return dz


@triton.jit
def softmax_gradient(z, lse, is_target, scale, of_softmax, smoothing, num_classes):
    """Return dz of logits within the softmax; `of_softmax` is scale * (1 + 2 z_loss lse)."""
    of_target = tl.where(is_target, scale * (1.0 - smoothing), 0.0)
    return of_softmax * tl.exp(z - lse) - of_target - scale * (smoothing / num_classes)


@triton.jit
def position_loss(lse, target, sum_z, z_loss, smoothing, num_classes):
    return lse - (1.0 - smoothing) * target - smoothing / num_classes * sum_z + z_loss * lse * lse


def product(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """Write a b into `out`, or add it; `out` has the dtype of a and b, or is fp32."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, out=out, beta=int(add))
    elif out.device.type == "cpu":  # in tests; no mixed product exists there
        out.copy_(out + a.float() @ b.float() if add else a.float() @ b.float())
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out, beta=int(add))
