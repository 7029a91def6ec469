"""``varlen_attention`` by the flash-attn package, or by PyTorch's copy of it (FlashAttention-2, arXiv 2307.08691).

Both take bf16 and fp16 on CUDA, head dims that are multiples of 8 up to 256, and a window over the index in the
document. The package's backward pass is always deterministic, PyTorch's under ``torch.use_deterministic_algorithms``.
"""

import torch
from torch import Tensor

from enc.kernels.attention_rules import Rules
from enc.kernels.tensors import unit_last_stride

_NO_DROPOUT = 0.0
_NOT_CAUSAL = False


def forward(name: str, q: Tensor, k: Tensor, v: Tensor, rules: Rules) -> tuple[Tensor, Tensor]:
    """Return the output (Tq, H, D) and the logsumexp of the scores (H, Tq) fp32; ``name`` as in ``backend``."""
    if not len(q) or not len(k):
        return q.new_zeros(q.shape), q.new_zeros(q.shape[1::-1], dtype=torch.float32)
    bounds, window = _bounds(rules), -1 if rules.window is None else rules.window
    if name == "flash-attn":
        from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

        out, lse, *_ = _flash_attn_varlen_forward(
            q, k, v, *bounds, _NO_DROPOUT, rules.scale, _NOT_CAUSAL, window_size_left=window, window_size_right=window
        )
    else:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *(unit_last_stride(x) for x in (q, k, v)), *bounds, _NO_DROPOUT, _NOT_CAUSAL, False,
            scale=rules.scale, window_size_left=window, window_size_right=window,
        )  # fmt: skip
    return out.contiguous(), lse.contiguous()


def backward(
    name: str, grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, rules: Rules
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    if not len(q) or not len(k):
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    bounds, window = _bounds(rules), -1 if rules.window is None else rules.window
    if name == "flash-attn":
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

        grads = q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
        softcap, alibi_slopes, deterministic = 0.0, None, True
        _flash_attn_varlen_backward(
            grad, q, k, v, out, lse, *grads, *bounds, _NO_DROPOUT, rules.scale, _NOT_CAUSAL, window, window,
            softcap, alibi_slopes, deterministic,
        )  # fmt: skip
        return grads
    rng_state, unused = q.new_zeros(2, dtype=torch.uint64), q.new_empty(0)
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        *(unit_last_stride(x) for x in (grad, q, k, v)), out, lse, *bounds, _NO_DROPOUT, _NOT_CAUSAL,
        rng_state, unused, scale=rules.scale, window_size_left=window, window_size_right=window,
    )  # fmt: skip
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def _bounds(rules: Rules) -> tuple[Tensor, Tensor, int, int]:
    """Return the bounds of queries and keys and the longest document of either."""
    longest = rules.max_seqlen
    if longest is None:
        longest = int(torch.stack([bounds.diff().max() for bounds in rules.bounds]).max())
    return *rules.bounds, longest, longest
