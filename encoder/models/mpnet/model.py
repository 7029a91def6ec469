"""MPNet (arXiv 2004.09297) on flat tokens: learned positions, T5's relative bias shared by all layers, a tied head.

The block is ``x = norm(x + o(attention(x)))`` and ``x = norm(x + ffn(x))``, or with `normalize_before` as in NeoBERT,
``x += o(attention(norm(x)))`` and ``x += ffn(norm(x))``, with one more norm after the last block. Parameter names are
those of transformers' ``MPNetForMaskedLM``, so a state dict is one of its checkpoints.

For masked and permuted training a document's tokens are those of the text in order, a placeholder for each predicted
one, and a query for each predicted one. Text and placeholders are the keys; stages (``kernels/attention_rules.py``) say
which of them a token sees. With the text alone this is the plain encoder.

Shapes: X tokens, T of them keys, M of them labelled, E hidden size, H heads, D head dim (E = H D), F feed-forward size,
N documents, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from enc.encoder.models.layers import AttentionLayout, LayerNorm, Recompute, attend, matmul_dtype, run_blocks
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
    """One layer, (X, E) to (X, E), or to the queries of the layout, (M, E)."""

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

    def forward(self, x: Tensor, layout: AttentionLayout, bias: RelativeBias) -> Tensor:
        # As in NeoBERT the residual stream stays fp32 under autocast; what matmuls read is cast once.
        dtype = matmul_dtype(x)
        if self.pre_norm:
            attended = self.attend(self.attention.LayerNorm(x, dtype=dtype), layout, bias)
            x, normed = self.output.LayerNorm(layout.select_queries(x), attended, dtype)
            return x + self.feed_forward(normed)
        attended = self.attend(x.to(dtype or x.dtype), layout, bias)
        _, x = self.attention.LayerNorm(layout.select_queries(x), attended)
        y: Tensor = self.output.LayerNorm(x, self.feed_forward(x.to(dtype or x.dtype)))[1]
        return y

    def attend(self, x: Tensor, layout: AttentionLayout, bias: RelativeBias) -> Tensor:
        attn, keys = self.attention.attn, layout.select_keys(x)
        q, k, v = (
            project(tokens).unflatten(1, (self.num_heads, -1))
            for project, tokens in ((attn.q, layout.select_queries(x)), (attn.k, keys), (attn.v, keys))
        )
        dropout_p = self.attention_dropout_p if self.training else 0.0
        return dropout(attn.o(attend(q, k, v, layout, dropout_p, bias=bias)), self.dropout_p, self.training)

    def feed_forward(self, x: Tensor) -> Tensor:
        inner = dropout(self.activation(self.intermediate.dense(x)), self.activation_dropout_p, self.training)
        return dropout(self.output.dense(inner), self.dropout_p, self.training)


class Mpnet(nn.Module):
    """The trunk: token ids (X,) to hidden states (X, E), or those of some tokens, (M, E)."""

    def __init__(self, config: MpnetConfig, vocab_size: int) -> None:
        super().__init__()
        size = config.hidden_size
        self.dropout_p, self.max_distance = config.dropout_prob, config.max_distance
        self.embeddings: Any = _group(
            word_embeddings=nn.Embedding(vocab_size, size),
            position_embeddings=nn.Embedding(config.max_position_embeddings + POSITION_OFFSET, size),
            LayerNorm=_norm(config),
        )
        self.encoder: Any = _group(
            layer=nn.ModuleList(MpnetBlock(config) for _ in range(config.num_hidden_layers)),
            relative_attention_bias=nn.Embedding(config.num_buckets, config.num_attention_heads),
        )
        if config.normalize_before:
            self.encoder.LayerNorm = _norm(config)
        self.recompute: Recompute | None = None

    def forward(
        self, input_ids: Tensor, layout: AttentionLayout, position_ids: Tensor, label_positions: Tensor | None = None
    ) -> Tensor:
        tables, encoder = self.embeddings, self.encoder
        x = tables.word_embeddings(input_ids)  # (X, E)
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # engines may hold the weights in bf16
        x = tables.LayerNorm(x + tables.position_embeddings(position_ids + POSITION_OFFSET))
        x = dropout(x, self.dropout_p, self.training)
        bias = RelativeBias(encoder.relative_attention_bias.weight, self.max_distance)
        x = run_blocks(encoder.layer, x, layout, bias, label_positions=label_positions, recompute=self.recompute)
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
        vocab_size = padded_vocab_size(num_tokens)
        self.num_tokens, self.activation = num_tokens, ACTIVATIONS[config.hidden_act]
        self.mpnet = Mpnet(config, vocab_size)
        self.lm_head: Any = _group(dense=nn.Linear(config.hidden_size, config.hidden_size), layer_norm=_norm(config))
        self.lm_head.bias = nn.Parameter(torch.zeros(vocab_size))

    @property
    def head_weight(self) -> Tensor:
        """The embedding (V, E)."""
        weight: Tensor = self.mpnet.embeddings.word_embeddings.weight
        return weight

    @property
    def head_bias(self) -> Tensor:
        """The head's bias (V,)."""
        bias: Tensor = self.lm_head.bias
        return bias

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks, in order: what engines shard and torch.compile compiles one by one."""
        layers: nn.ModuleList = self.mpnet.encoder.layer
        return layers

    def recompute(self, what: Literal["full", "selective"] | None, every: int = 1) -> None:
        """Compute every so many-th block again in the backward pass, `selective` without its products and attention."""
        self.mpnet.recompute = Recompute(what, every) if what else None

    def forward(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        position_ids: Tensor,
        label_positions: Tensor | None = None,
        max_seqlen: int | None = None,
        *,
        cu_seqlens_q: Tensor | None = None,
        key_indices: Tensor | None = None,
        stages: Tensor | None = None,
        key_stages: Tensor | None = None,
    ) -> Tensor:
        """Encode packed documents.

        Args:
            input_ids: (X,) integer token ids.
            cu_seqlens: (N + 1,) int32 document boundaries among the keys.
            position_ids: (X,) integer position of a token in its document.
            label_positions: (M,) int64 tokens whose states are wanted, ascending; the last layer is computed for these.
            max_seqlen: At least the longest document's keys and tokens.
            cu_seqlens_q: (N + 1,) int32 document boundaries among the tokens, where not all are keys.
            key_indices: (T,) int64 tokens that are keys, ascending; None for all.
            stages, key_stages: (X,) and (T,) int32 stages of tokens and keys; None: all see their whole document.

        Returns:
            The hidden states, (X, E), or (M, E) of `label_positions`; fp32 under autocast.
        """
        layout = AttentionLayout(
            cu_seqlens,
            max_seqlen,
            cu_seqlens_q=cu_seqlens_q,
            key_indices=key_indices,
            stages=None if stages is None or key_stages is None else (stages, key_stages),
        )
        hidden: Tensor = self.mpnet(input_ids, layout.with_positions(position_ids), position_ids, label_positions)
        return hidden

    def transform(self, hidden: Tensor) -> Tensor:
        """Return what the head's matrix reads: dense, activation and norm of hidden states, (M, E)."""
        transformed: Tensor = self.lm_head.layer_norm(self.activation(self.lm_head.dense(hidden)))
        return transformed

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
