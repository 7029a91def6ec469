"""MPNet (arXiv 2004.09297) on flat rows: learned positions, T5's relative bias shared by all layers, a tied head.

The block is ``x = norm(x + o(attention(x)))`` and ``x = norm(x + ffn(x))``, or with `normalize_before` as in NeoBERT,
``x += o(attention(norm(x)))`` and ``x += ffn(norm(x))``, with one more norm after the last block. Parameter names are
those of transformers' ``MPNetForMaskedLM``, so a state dict is one of its checkpoints.

For masked and permuted training a document's rows are its tokens in text order, a placeholder for each predicted token,
and a query for each predicted token. Tokens and placeholders are the keys; stages (``kernels/attention_rules.py``) say
which of them a row sees. With the tokens alone this is the plain encoder.

Shapes: X rows, T of them keys, M of them labelled, E hidden size, H heads, D head dim (E = H D), F feed-forward size, N
documents, V embedding rows.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from enc.encoder.models.layers import LayerNorm, Packing, attend, matmul_dtype, recomputed
from enc.encoder.models.mpnet.architecture import POSITION_OFFSET
from enc.encoder.models.mpnet.config import MpnetConfig
from enc.encoder.models.vocabulary import padded_vocab_size
from enc.kernels.attention_rules import RelativeBias
from enc.kernels.dropout import dropout

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_accurate": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "silu": F.silu,
    "tanh": torch.tanh,
    "linear": lambda x: x,
}


class MpnetBlock(nn.Module):
    """One layer, (X, E) to (X, E), or to the rows of the packing, (M, E)."""

    def __init__(self, config: MpnetConfig) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        self.num_heads, self.pre_norm = config.num_attention_heads, config.normalize_before
        self.dropout_p, self.attention_dropout_p = config.dropout_prob, config.attention_dropout_prob
        self.activation_dropout_p, self.activation = config.activation_dropout_prob, ACTIVATIONS[config.hidden_act]
        projections = _group(**{name: nn.Linear(size, size) for name in "qkvo"})
        self.attention: Any = _group(attn=projections, LayerNorm=_norm(config))
        self.intermediate: Any = _group(dense=nn.Linear(size, inner))
        self.output: Any = _group(dense=nn.Linear(inner, size), LayerNorm=_norm(config))

    def forward(self, x: Tensor, packing: Packing, bias: RelativeBias) -> Tensor:
        # As in NeoBERT the residual stream stays fp32 under autocast; what matmuls read is cast once.
        dtype = matmul_dtype(x)
        if self.pre_norm:
            attended = self.attend(self.attention.LayerNorm(x, dtype=dtype), packing, bias)
            x, normed = self.output.LayerNorm(packing.of(x), attended, dtype)
            return x + self.feed_forward(normed)
        attended = self.attend(x.to(dtype or x.dtype), packing, bias)
        _, x = self.attention.LayerNorm(packing.of(x), attended)
        return self.output.LayerNorm(x, self.feed_forward(x.to(dtype or x.dtype)))[1]

    def attend(self, x: Tensor, packing: Packing, bias: RelativeBias) -> Tensor:
        attn, keys = self.attention.attn, packing.keys_of(x)
        q, k, v = (
            project(rows).unflatten(1, (self.num_heads, -1))
            for project, rows in ((attn.q, packing.of(x)), (attn.k, keys), (attn.v, keys))
        )
        dropout_p = self.attention_dropout_p if self.training else 0.0
        return dropout(attn.o(attend(q, k, v, packing, dropout_p, bias=bias)), self.dropout_p, self.training)

    def feed_forward(self, x: Tensor) -> Tensor:
        inner = dropout(self.activation(self.intermediate.dense(x)), self.activation_dropout_p, self.training)
        return dropout(self.output.dense(inner), self.dropout_p, self.training)


class Mpnet(nn.Module):
    """The trunk: token ids (X,) to hidden states (X, E), or those of some rows, (M, E)."""

    def __init__(self, config: MpnetConfig, num_rows: int) -> None:
        super().__init__()
        size = config.hidden_size
        self.dropout_p, self.max_distance = config.dropout_prob, config.max_distance
        self.embeddings: Any = _group(
            word_embeddings=nn.Embedding(num_rows, size),
            position_embeddings=nn.Embedding(config.max_position_embeddings + POSITION_OFFSET, size),
            LayerNorm=_norm(config),
        )
        self.encoder: Any = _group(
            layer=nn.ModuleList(MpnetBlock(config) for _ in range(config.num_hidden_layers)),
            relative_attention_bias=nn.Embedding(config.num_buckets, config.num_attention_heads),
        )
        if config.normalize_before:
            self.encoder.LayerNorm = _norm(config)
        self.recompute: Literal["full", "selective"] | None = None
        self.recompute_every = 1

    def forward(self, input_ids: Tensor, packing: Packing, position_ids: Tensor, rows: Tensor | None = None) -> Tensor:
        tables, encoder = self.embeddings, self.encoder
        x = tables.word_embeddings(input_ids)  # (X, E)
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # engines may hold the weights in bf16
        x = tables.LayerNorm(x + tables.position_embeddings(position_ids + POSITION_OFFSET))
        x = dropout(x, self.dropout_p, self.training)
        bias = RelativeBias(encoder.relative_attention_bias.weight, self.max_distance)
        last = len(encoder.layer) - 1
        for index, block in enumerate(encoder.layer):
            if index == last and rows is not None:
                packing = packing.only(rows)
            if self.recompute and index % self.recompute_every == 0 and torch.is_grad_enabled():
                x = recomputed(block, x, packing, bias, selective=self.recompute == "selective")
            else:
                x = block(x, packing, bias)
        return encoder.LayerNorm(x) if hasattr(encoder, "LayerNorm") else x


class MpnetForMaskedLM(nn.Module):
    """MPNet with its language-model head, whose matrix is the embedding.

    As in ``NeoBertForMaskedLM``, the embedding's rows from ``num_tokens`` on are inert.

    Args:
        config: The model section of a run config.
        num_tokens: Tokens of the tokenizer.
    """

    softcap = None

    def __init__(self, config: MpnetConfig, num_tokens: int) -> None:
        super().__init__()
        num_rows = padded_vocab_size(num_tokens)
        self.num_tokens, self.activation = num_tokens, ACTIVATIONS[config.hidden_act]
        self.mpnet = Mpnet(config, num_rows)
        self.lm_head: Any = _group(dense=nn.Linear(config.hidden_size, config.hidden_size), layer_norm=_norm(config))
        self.lm_head.bias = nn.Parameter(torch.zeros(num_rows))

    @property
    def head_weight(self) -> Tensor:
        """The embedding (V, E)."""
        return self.mpnet.embeddings.word_embeddings.weight

    @property
    def head_bias(self) -> Tensor:
        """The head's bias (V,)."""
        return self.lm_head.bias

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks, in order: what engines shard and torch.compile compiles one by one."""
        return self.mpnet.encoder.layer

    def recompute(self, what: Literal["full", "selective"] | None, every: int = 1) -> None:
        """Compute every so many-th block again in the backward pass, `selective` without its products and attention."""
        self.mpnet.recompute, self.mpnet.recompute_every = what, every

    def forward(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        position_ids: Tensor,
        rows: Tensor | None = None,
        max_seqlen: int | None = None,
        *,
        cu_seqlens_q: Tensor | None = None,
        key_rows: Tensor | None = None,
        stages: Tensor | None = None,
        key_stages: Tensor | None = None,
    ) -> Tensor:
        """Encode packed documents.

        Args:
            input_ids: (X,) integer token ids.
            cu_seqlens: (N + 1,) int32 document boundaries among the keys.
            position_ids: (X,) integer position of a row in its document.
            rows: (M,) int64 rows whose states are wanted, ascending; the last layer is computed for these only.
            max_seqlen: At least the longest document's keys and rows.
            cu_seqlens_q: (N + 1,) int32 document boundaries among the rows, where not all rows are keys.
            key_rows: (T,) int64 rows that are keys, ascending; None for all.
            stages, key_stages: (X,) and (T,) int32 stages of rows and keys; None: every row sees its whole document.

        Returns:
            The hidden states, (X, E), or (M, E) of `rows`; fp32 under autocast.
        """
        positions = position_ids.to(torch.int32)
        packing = Packing(cu_seqlens, max_seqlen, cu_seqlens_q=cu_seqlens_q, key_rows=key_rows)
        packing = packing._replace(
            positions=(positions, packing.keys_of(positions)),
            stages=None if stages is None or key_stages is None else (stages, key_stages),
        )
        return self.mpnet(input_ids, packing, position_ids, rows)

    def transform(self, hidden: Tensor) -> Tensor:
        """Return what the head's matrix reads: dense, activation and norm of hidden states, (M, E)."""
        return self.lm_head.layer_norm(self.activation(self.lm_head.dense(hidden)))

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the scores of every row of the vocabulary, the inert ones too, (M, V)."""
        return F.linear(self.transform(hidden), self.head_weight, self.head_bias)


def _group(**members: nn.Module) -> nn.Module:
    """Return a module that only holds others, so that parameters get the names they have in transformers."""
    group = nn.Module()
    for name, member in members.items():
        group.add_module(name, member)
    return group


def _norm(config: MpnetConfig) -> LayerNorm:
    return LayerNorm(config.hidden_size, eps=config.norm_eps)
