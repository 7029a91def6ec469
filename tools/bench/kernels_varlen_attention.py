"""Attention over packed documents: the sides and shapes of `enc bench kernels varlen_attention`.

A side is `f(q, k, v, cu_seqlens, max_seqlen, bias_table) -> out`, q, k, v and out (T, H, D); the table (buckets, H) is
that of MPNet's and T5's relative bias up to a distance of 128, fp32, or None.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from enc.kernels.attention_rules import RelativeBias, relative_buckets
from enc.kernels.varlen_attention import varlen_attention

MAX_DISTANCE = 128
Shape = dict[str, Any]
_BASE = {"tokens": 65536, "length": 1024, "heads": 12, "head_dim": 64, "buckets": 0}
SHAPES: dict[str, Shape] = {
    "small": {"tokens": 2048, "length": 256, "heads": 6, "head_dim": 64, "buckets": 0},
    "512": _BASE | {"length": 512},
    "1024": _BASE,
    "bias-512": _BASE | {"length": 512, "buckets": 32},
    "bias-2048": _BASE | {"length": 2048, "buckets": 32},
}


def _enc(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, table: Tensor | None) -> Tensor:
    bias = None if table is None else RelativeBias(table, MAX_DISTANCE)
    return varlen_attention(q, k, v, cu_seqlens, max_seqlen=max_seqlen, bias=bias)


def _sdpa_padded(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, table: Tensor | None) -> Tensor:
    """Pad to the longest document; the bias is one dense matrix for all of them."""
    lengths = cu_seqlens.diff()
    places = torch.arange(max_seqlen, device=q.device)
    real = places < lengths[:, None]  # (N, L)
    index = torch.where(real, cu_seqlens[:-1, None] + places, 0)
    a, b, c = (x[index].transpose(1, 2) for x in (q, k, v))  # (N, H, L, D)
    mask = None if bool(real.all()) else real[:, None, None, :]
    if table is not None:
        buckets = relative_buckets(places[None, :] - places[:, None], len(table), MAX_DISTANCE)
        bias = table[buckets].permute(2, 0, 1).to(q.dtype)  # (H, L, L)
        mask = bias[None] if mask is None else torch.where(mask, bias, -torch.inf)
    out = F.scaled_dot_product_attention(a, b, c, attn_mask=mask)
    return out.transpose(1, 2)[real]


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, table: Tensor | None) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    if table is not None:
        raise NotImplementedError("flash-attn has no additive bias")
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)


SIDES: dict[str, Callable[..., Tensor]] = {"enc": _enc, "sdpa-padded": _sdpa_padded, "flash-attn": _flash_attn}


def flops(shape: Shape) -> int:
    """Return the operations of forward (4 n^2 D a head) and backward (8 n^2 D, what is computed again left out)."""
    return 12 * shape["tokens"] * shape["length"] * shape["heads"] * shape["head_dim"]


def bytes(shape: Shape) -> int:
    """Return the bytes of forward (q, k, v, output) and backward (the same, its gradient, three gradients) in bf16."""
    return 2 * 12 * shape["tokens"] * shape["heads"] * shape["head_dim"]


def available(side: str) -> str | None:
    """Say why a side cannot run here, None if it can."""
    if side == "flash-attn" and find_spec("flash_attn") is None:
        return "the package flash-attn is not installed"
    return None
