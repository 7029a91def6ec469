"""Attention over packed documents: the sides and shapes of `enc bench kernels varlen_attention`.

A side is `f(q, k, v, cu_seqlens, max_seqlen, bias_table) -> out`, q, k, v and out (T, H, D); the table (buckets, H) is
that of MPNet's and T5's relative bias up to a distance of 128, fp32, or None. Every side pays in each call for what it
makes of them: masks, dense biases, padding.
"""

import functools
import itertools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from enc.kernels.attention_rules import RelativeBias, relative_buckets
from enc.kernels.varlen_attention import varlen_attention

MAX_DISTANCE = 128
# Lengths in a natural mix, as shares of `length`: many short documents, most tokens in the long ones.
_MIX = (0.1, 0.14, 0.17, 0.2, 0.26, 0.34, 0.42, 0.55, 0.75, 1.0)
Shape = dict[str, Any]
_BASE = {"tokens": 65536, "length": 512, "natural": 0, "heads": 12, "head_dim": 64, "buckets": 0}
SHAPES: dict[str, Shape] = {
    "small": _BASE | {"tokens": 2048, "length": 500, "natural": 1},
    "512": _BASE,
    "2048": _BASE | {"length": 2048},
    "natural": _BASE | {"natural": 1},
    "bias-512": _BASE | {"buckets": 32},
    "bias-2048": _BASE | {"length": 2048, "buckets": 32},
    "bias-natural": _BASE | {"natural": 1, "buckets": 32},
}


def lengths(shape: Shape) -> list[int]:
    """Return the documents' numbers of tokens: `length` each, or the natural mix up to it; the last one is cut."""
    shares = itertools.cycle(_MIX if shape["natural"] else (1.0,))
    found: list[int] = []
    while (left := shape["tokens"] - sum(found)) > 0:
        found.append(min(left, max(1, round(next(shares) * shape["length"]))))
    return found


def _enc(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, table: Tensor | None) -> Tensor:
    bias = None if table is None else RelativeBias(table, MAX_DISTANCE)
    return varlen_attention(q, k, v, cu_seqlens, max_seqlen=max_seqlen, bias=bias)


def _sdpa_padded(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, table: Tensor | None) -> Tensor:
    """Pad to the longest document; the bias is one dense matrix for all of them."""
    places = torch.arange(max_seqlen, device=q.device)
    real = places < cu_seqlens.diff()[:, None]  # (N, L)
    index = torch.where(real, cu_seqlens[:-1, None] + places, 0)
    a, b, c = (x[index].transpose(1, 2) for x in (q, k, v))  # (N, H, L, D)
    mask = None if bool(real.all()) else real[:, None, None, :]
    if table is not None:
        bias = _dense_bias(places, table, q.dtype)[None]
        mask = bias if mask is None else torch.where(mask, bias, -torch.inf)
    return F.scaled_dot_product_attention(a, b, c, attn_mask=mask).transpose(1, 2)[real]


def _sdpa_masked(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, table: Tensor | None) -> Tensor:
    """Hide the other documents by a dense (T, T) mask."""
    document = _document_of(cu_seqlens, len(q))
    mask = document[:, None] == document[None, :]
    if table is not None:
        mask = torch.where(mask, _dense_bias(torch.arange(len(q), device=q.device), table, q.dtype), -torch.inf)[None]
    a, b, c = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(a, b, c, attn_mask=mask)[0].transpose(0, 1)


def _sdpa_loop(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, table: Tensor | None) -> Tensor:
    """Call SDPA once a document."""
    bias = None
    if table is not None:
        bias = _dense_bias(torch.arange(max_seqlen, device=q.device), table, q.dtype)
    outputs = []
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        a, b, c = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
        mask = None if bias is None else bias[None, :, : end - start, : end - start]
        outputs.append(F.scaled_dot_product_attention(a, b, c, attn_mask=mask)[0].transpose(0, 1))
    return torch.cat(outputs)


def _flex(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, table: Tensor | None) -> Tensor:
    """Compile torch's flex attention for a document mask and, with a table, a score function."""
    from torch.nn.attention.flex_attention import create_block_mask

    document = _document_of(cu_seqlens, len(q))
    mask = create_block_mask(
        lambda b, h, i, j: document[i] == document[j], None, None, len(q), len(q), device=q.device, _compile=True
    )
    heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
    if table is None:
        return _compiled_flex()(*heads_first, block_mask=mask)[0].transpose(0, 1)
    distances = torch.arange(-MAX_DISTANCE, MAX_DISTANCE + 1, device=q.device)
    by_distance = table[relative_buckets(distances, len(table), MAX_DISTANCE)]  # (2 * MAX_DISTANCE + 1, H)

    def biased(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + by_distance[(j - i).clamp(-MAX_DISTANCE, MAX_DISTANCE) + MAX_DISTANCE, h]

    return _compiled_flex()(*heads_first, score_mod=biased, block_mask=mask)[0].transpose(0, 1)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, table: Tensor | None) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    if table is not None:
        raise NotImplementedError("flash-attn has no additive bias")
    out: Tensor = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return out


def _document_of(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    return torch.searchsorted(cu_seqlens, torch.arange(num_tokens, device=cu_seqlens.device), right=True)


def _dense_bias(places: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    buckets = relative_buckets(places[None, :] - places[:, None], len(table), MAX_DISTANCE)
    return table[buckets].permute(2, 0, 1).to(dtype)  # (H, L, L)


SIDES: dict[str, Callable[..., Tensor]] = {
    "enc": _enc,
    "sdpa-padded": _sdpa_padded,
    "sdpa-masked": _sdpa_masked,
    "sdpa-loop": _sdpa_loop,
    "flex": _flex,
    "flash-attn": _flash_attn,
}


def flops(shape: Shape) -> int:
    """Return the operations of forward (4 n^2 D a head) and backward (8 n^2 D, what is computed again left out)."""
    width: int = shape["heads"] * shape["head_dim"]
    return 12 * sum(n * n for n in lengths(shape)) * width


def bytes(shape: Shape) -> int:
    """Return the bytes of forward (q, k, v, output) and backward (the same, its gradient, three gradients) in bf16."""
    numbers: int = shape["tokens"] * shape["heads"] * shape["head_dim"]
    return 2 * 12 * numbers


def available(side: str, device: str | None = None) -> str | None:
    """Say why a side cannot run on a device, the GPU where there is one if None is given; None if it can."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if side == "flash-attn" and find_spec("flash_attn") is None:
        return "the package flash-attn is not installed"
    if side == "flex" and device == "cpu":
        return "flex_attention has no backward pass on the CPU"
    return None
