"""Attention over packed documents: the sides and shapes of `enc bench kernels varlen_attention`."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from enc.kernels.varlen_attention import varlen_attention

Shape = dict[str, Any]
SHAPES: dict[str, Shape] = {
    "small": {"tokens": 2048, "length": 256, "heads": 6, "head_dim": 64, "bias": 0},
    "512": {"tokens": 65536, "length": 512, "heads": 12, "head_dim": 64, "bias": 0},
}


def _enc(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, bias: Tensor | None) -> Tensor:
    return varlen_attention(q, k, v, cu_seqlens)


def _torch(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, bias: Tensor | None) -> Tensor:
    document = torch.repeat_interleave(torch.arange(len(cu_seqlens) - 1), cu_seqlens.cpu().diff()).to(q.device)
    mask = document[:, None] == document[None, :]
    a, b, c = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    return F.scaled_dot_product_attention(a, b, c, attn_mask=mask)[0].transpose(0, 1)


SIDES: dict[str, Callable[..., Tensor]] = {"enc": _enc, "sdpa-dense": _torch}


def flops(shape: Shape) -> int:
    return 12 * shape["tokens"] * shape["length"] * shape["heads"] * shape["head_dim"]


def bytes(shape: Shape) -> int:
    return 2 * 12 * shape["tokens"] * shape["heads"] * shape["head_dim"]


def available(side: str) -> str | None:
    return None
