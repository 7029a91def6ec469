"""Layers that the encoders share. Everything runs on flat tokens: documents one after the other, no batch axis.

Shapes: X tokens (those of the text, and what an objective adds), T of them keys, M of them that a layer is computed
for, E hidden size, H heads, D head dim (E = H D), F feed-forward size, N documents.
"""

from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from enc.kernels.attention_rules import RelativeBias
from enc.kernels.norms import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from enc.kernels.rope import rope, rope_qkv
from enc.kernels.swiglu import swiglu
from enc.kernels.varlen_attention import varlen_attention


class RMSNorm(nn.Module):
    """RMSNorm with a weight and no bias, (..., E)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, branch: Tensor | None = None, dtype: torch.dtype | None = None) -> Any:
        """Return the norm of x in this dtype; with a branch the pair (x + branch, its norm)."""
        if branch is None:
            return rms_norm(x, self.weight, self.eps, dtype)
        return add_rms_norm(x, branch, self.weight, self.eps, dtype)


class LayerNorm(nn.LayerNorm):
    """LayerNorm with weight and bias, (..., E); called as ``RMSNorm`` is."""

    def forward(self, x: Tensor, branch: Tensor | None = None, dtype: torch.dtype | None = None) -> Any:
        if branch is None:
            return layer_norm(x, self.weight, self.bias, self.eps, dtype)
        return add_layer_norm(x, branch, self.weight, self.bias, self.eps, dtype)


class SwiGLU(nn.Module):
    """``w3(silu(w1 x) * w2 x)`` without biases, (T, E) to (T, E)."""

    def __init__(self, size: int, hidden_size: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(size, hidden_size, bias=False)
        self.w2 = nn.Linear(size, hidden_size, bias=False)
        self.w3 = nn.Linear(hidden_size, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.w3(swiglu(self.w1(x), self.w2(x)))
        return y


class AttentionLayout(NamedTuple):
    """Where the documents lie among X flat tokens, which tokens are keys, and for which queries a layer is computed.

    Both are all tokens but where `key_indices` names T of them, `query_indices` M of them.
    """

    cu_seqlens: Tensor  # (N + 1,) int32: bounds of the documents among the keys
    max_seqlen: int | None = None
    query_indices: Tensor | None = None  # (M,) int64, ascending
    cu_seqlens_q: Tensor | None = None  # (N + 1,) int32: bounds of the documents among the queries
    key_indices: Tensor | None = None  # (T,) int64, ascending
    positions: tuple[Tensor, Tensor] | None = None  # (X or M,) and (T,) int32, of queries and keys
    stages: tuple[Tensor, Tensor] | None = None  # (X or M,) and (T,) int32

    def with_positions(self, position_ids: Tensor) -> "AttentionLayout":
        """Return the layout with the positions of tokens (X,) in their documents."""
        positions = position_ids.to(torch.int32)
        return self._replace(positions=(positions, self.select_keys(positions)))

    def with_queries(self, indices: Tensor) -> "AttentionLayout":
        """Return the layout of a layer that is computed for some tokens, which read the keys and values of all."""
        bounds = self.cu_seqlens if self.cu_seqlens_q is None else self.cu_seqlens_q
        bounds = torch.searchsorted(indices, bounds.to(indices), out_int32=True)
        positions, stages = (pair and (pair[0][indices], pair[1]) for pair in (self.positions, self.stages))
        return self._replace(query_indices=indices, cu_seqlens_q=bounds, positions=positions, stages=stages)

    def select_queries(self, x: Tensor) -> Tensor:
        """Return what the queries have of x (X, ...)."""
        return x if self.query_indices is None else x.index_select(0, self.query_indices)

    def select_keys(self, x: Tensor) -> Tensor:
        """Return what the keys have of x (X, ...)."""
        return x if self.key_indices is None else x.index_select(0, self.key_indices)


class RotaryQKV(nn.Linear):
    """Queries, keys and values of H heads in one product, with rotary positions.

    The weight's rows are q, k, v of head 0, then of head 1, ..., (3 E, E).
    """

    def __init__(self, size: int, num_heads: int) -> None:
        super().__init__(size, 3 * size, bias=False)
        self.num_heads = num_heads

    def forward(  # type: ignore[override]
        self, x: Tensor, layout: AttentionLayout, cos_sin: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries of the layout (M, H, D), keys and values of all tokens (T, H, D).

        `cos_sin` (T, D / 2, 2) are the rotations of the tokens, None for a model without.
        """
        if layout.query_indices is not None:
            return self._forward_for_queries(x, layout, cos_sin)
        qkv = super().forward(x).view(len(x), self.num_heads, 3, -1)  # (T, H, 3, D)
        q, k, v = qkv.unbind(2) if cos_sin is None else rope_qkv(qkv, cos_sin)
        return q, k, v

    def _forward_for_queries(
        self, x: Tensor, layout: AttentionLayout, cos_sin: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        weight = self.weight.unflatten(0, (self.num_heads, 3, -1))  # (H, 3, D, E)
        q = F.linear(layout.select_queries(x), weight[:, 0].flatten(0, 1))
        q = q.unflatten(1, (self.num_heads, -1))  # (M, H, D)
        kv = F.linear(x, weight[:, 1:].flatten(0, 2)).view(len(x), self.num_heads, 2, -1)
        k, v = kv.unbind(2)
        return (q, k, v) if cos_sin is None else (rope(q, layout.select_queries(cos_sin)), rope(k, cos_sin), v)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: AttentionLayout,
    dropout_p: float,
    scale: float | None = None,
    bias: RelativeBias | None = None,
) -> Tensor:
    """Attend within each document, queries (M, H, D) to keys and values (T, H, D), and join the heads to (M, E)."""
    out = varlen_attention(
        q,
        k,
        v,
        layout.cu_seqlens,
        dropout_p,
        scale,
        cu_seqlens_q=layout.cu_seqlens_q,
        max_seqlen=layout.max_seqlen,
        bias=bias,
        stages=layout.stages,
        positions=layout.positions,
    )
    return out.flatten(1)


# What selective recomputation keeps: the operations that cost most, a small part of what a block keeps otherwise.
_KEPT = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.enc.varlen_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
]


class Recompute(NamedTuple):
    """Which blocks are computed again in the backward pass: every so many-th, whole or `selective`."""

    what: Literal["full", "selective"]
    every: int


def run_blocks(
    blocks: nn.ModuleList,
    x: Tensor,
    layout: AttentionLayout,
    *more: Any,
    label_positions: Tensor | None,
    recompute: Recompute | None,
) -> Tensor:
    """Run blocks, called as ``block(x, layout, *more)``, one after the other: (X, E) to (X, E).

    The last one is computed for `label_positions` (M,) only, if there are any, and gives (M, E).
    """
    last = len(blocks) - 1
    for index, block in enumerate(blocks):
        if index == last and label_positions is not None:
            layout = layout.with_queries(label_positions)
        if recompute and index % recompute.every == 0 and torch.is_grad_enabled():
            x = recomputed(block, x, layout, *more, selective=recompute.what == "selective")
        else:
            x = block(x, layout, *more)
    return x


def recomputed(block: nn.Module, *inputs: Any, selective: bool) -> Tensor:
    """Run a block that is computed again in the backward pass instead of keeping its activations.

    With ``selective`` the results of matrix products and attention are kept (torch's selective checkpointing).
    """
    contexts: dict[str, Any] = {"context_fn": partial(create_selective_checkpoint_contexts, _KEPT)} if selective else {}
    x: Tensor = checkpoint(block, *inputs, use_reentrant=False, **contexts)
    return x


def matmul_dtype(x: Tensor) -> torch.dtype | None:
    """Return the autocast dtype where autocast is on: cast to it once, and not again in each matmul that reads x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
