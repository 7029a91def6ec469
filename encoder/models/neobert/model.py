"""NeoBERT (arXiv 2502.19587) on flat tokens: a pre-norm encoder with rotary positions, RMSNorm and SwiGLU.

The block is ``x += wo(attention(norm(x)))`` and ``x += ffn(norm(x))``, followed by one norm after the last block.
Learned positions, LayerNorm, GELU and the nGPT block (arXiv 2410.01131) are options. Parameter names are those of the
public NeoBERT checkpoints, so their state dicts load as they are.

Shapes: T tokens, M of them that are labelled, E hidden size, H heads, D head dim (E = H D), F feed-forward size, N
documents, V vocabulary.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from enc.encoder.models.layers import (
    AttentionLayout,
    LayerNorm,
    Recompute,
    RMSNorm,
    RotaryQKV,
    SwiGLU,
    attend,
    matmul_dtype,
    run_blocks,
)
from enc.encoder.models.neobert.architecture import feed_forward_width
from enc.encoder.models.neobert.config import NeoBertConfig
from enc.encoder.models.vocabulary import padded_vocab_size
from enc.kernels.dropout import dropout
from enc.kernels.rope import rotary_cos_sin

_NGPT_ALPHA = 0.05  # the step towards a block's output at the start of training


class NeoBertBlock(nn.Module):
    """One pre-norm layer, (T, E) to (T, E), or to the queries of the layout, (M, E)."""

    def __init__(self, config: NeoBertConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.dropout_p = config.dropout_prob
        self.qkv = RotaryQKV(size, config.num_attention_heads)
        self.wo = nn.Linear(size, size, bias=False)
        self.ffn = _FEED_FORWARDS[config.hidden_act](size, feed_forward_width(config))
        self.attention_norm = _norm(config)
        self.ffn_norm = _norm(config)

    def forward(self, x: Tensor, layout: AttentionLayout, cos_sin: Tensor | None) -> Tensor:
        # The residual stream stays fp32 under autocast, as in NeoBERT: a bf16 sum over many layers loses small
        # updates. What leaves a norm has the dtype of the matmuls that read it.
        dtype = matmul_dtype(x)
        attended = self.attention(self.attention_norm(x, dtype=dtype), layout, cos_sin)
        x, normed = self.ffn_norm(layout.select_queries(x), dropout(attended, self.dropout_p, self.training), dtype)
        return x + dropout(self.ffn(normed), self.dropout_p, self.training)

    def attention(self, x: Tensor, layout: AttentionLayout, cos_sin: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x, layout, cos_sin)
        y: Tensor = self.wo(attend(q, k, v, layout, self.dropout_p if self.training else 0.0))
        return y


class NGptBlock(nn.Module):
    """One layer of nGPT (arXiv 2410.01131, §2): states are unit vectors, and a layer moves them along the sphere.

    Unlike the paper, and like NeoBERT's own variant, weights are not normalised again after a step.
    """

    def __init__(self, config: NeoBertConfig) -> None:
        super().__init__()
        size, hidden = config.hidden_size, feed_forward_width(config)
        self.dropout_p, self.base_scale = config.dropout_prob, config.base_scale
        self.qkv = RotaryQKV(size, config.num_attention_heads)
        self.wo = nn.Linear(size, size, bias=False)
        self.c_fc = nn.Linear(size, 2 * hidden, bias=False)
        self.mlp_c_proj = nn.Linear(hidden, size, bias=False)
        # Scales are stored times `base_scale`, which sets their effective learning rate under Adam (§2.5).
        self.attn_alpha = nn.Parameter(torch.full((size,), config.base_scale))
        self.mlp_alpha = nn.Parameter(torch.full((size,), config.base_scale))
        self.sqk = nn.Parameter(torch.full((size,), config.base_scale))
        self.suv = nn.Parameter(torch.ones(2 * hidden))

    def forward(self, x: Tensor, layout: AttentionLayout, cos_sin: Tensor | None) -> Tensor:
        x = self._move(layout.select_queries(x), self.attention(x, layout, cos_sin), self.attn_alpha)
        return self._move(x, self.ffn(x), self.mlp_alpha)

    def attention(self, x: Tensor, layout: AttentionLayout, cos_sin: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x, layout, cos_sin)
        sqk = (self.sqk / self.base_scale).view(q.shape[1:])  # (H, D)
        q, k = ((sqk * _unit(t)).to(v.dtype) for t in (q, k))
        dropout_p = self.dropout_p if self.training else 0.0
        y: Tensor = self.wo(attend(q, k, v, layout, dropout_p, scale=math.sqrt(q.shape[-1])))
        return y

    def ffn(self, x: Tensor) -> Tensor:
        u, v = (self.c_fc(x) * self.suv * math.sqrt(x.shape[-1])).chunk(2, dim=-1)  # (T, F) each
        y: Tensor = self.mlp_c_proj(u * F.silu(v))
        return y

    def _move(self, x: Tensor, target: Tensor, alpha: Tensor) -> Tensor:
        target = dropout(target, self.dropout_p, self.training)
        x, target = _unit(x), _unit(target.to(x.dtype))
        return _unit(x + (alpha * (_NGPT_ALPHA / self.base_scale)).abs() * (target - x))


class NeoBert(nn.Module):
    """The trunk: token ids (T,) to hidden states (T, E), or those of some tokens, (M, E)."""

    def __init__(self, config: NeoBertConfig, vocab_size: int) -> None:
        super().__init__()
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.encoder = nn.Embedding(vocab_size, config.hidden_size)
        self.rope = config.rope
        if not config.rope:  # row 0 belongs to padding, which flat batches do not have
            self.positional_embedding = nn.Embedding(config.max_position_embeddings + 1, config.hidden_size)
        block = NGptBlock if config.ngpt else NeoBertBlock
        self.transformer_encoder = nn.ModuleList(block(config) for _ in range(config.num_hidden_layers))
        self.layer_norm = nn.Identity() if config.ngpt else _norm(config)
        self.recompute: Recompute | None = None

    def forward(
        self, input_ids: Tensor, layout: AttentionLayout, position_ids: Tensor, label_positions: Tensor | None = None
    ) -> Tensor:
        x = self.encoder(input_ids)  # (T, E)
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # engines may hold the weights in bf16
        if not self.rope:
            x = x + self.positional_embedding(position_ids + 1)
        cos_sin = rotary_cos_sin(position_ids, self.head_dim) if self.rope else None  # (T, D / 2, 2)
        x = run_blocks(
            self.transformer_encoder, x, layout, cos_sin, label_positions=label_positions, recompute=self.recompute
        )
        hidden: Tensor = self.layer_norm(x)
        return hidden


class NeoBertForMaskedLM(nn.Module):
    """NeoBERT with its language-model head.

    The embedding has ``padded_vocab_size(num_tokens)`` rows; those from ``num_tokens`` on are inert: no token reads
    them and the loss leaves them out. A tied head has no parameter of its own: ``decoder`` is None and the state dict
    holds the tensor once, as ``model.encoder.weight``.

    Args:
        config: The model section of a run config.
        num_tokens: Tokens of the tokenizer.
    """

    def __init__(self, config: NeoBertConfig, num_tokens: int) -> None:
        super().__init__()
        vocab_size = padded_vocab_size(num_tokens)
        self.num_tokens, self.softcap = num_tokens, config.final_logit_softcapping
        self.model = NeoBert(config, vocab_size)
        tied = config.tie_word_embeddings and not config.ngpt
        self.decoder = None if tied else nn.Linear(config.hidden_size, vocab_size, bias=config.decoder_bias)

    @property
    def head_weight(self) -> Tensor:
        """The head's matrix (V, E), the embedding itself when tied."""
        return self.model.encoder.weight if self.decoder is None else self.decoder.weight

    @property
    def head_bias(self) -> Tensor | None:
        """The head's bias (V,), None unless ``decoder_bias``."""
        return None if self.decoder is None else self.decoder.bias

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks, in order: what engines shard and torch.compile compiles one by one."""
        return self.model.transformer_encoder

    def recompute(self, what: Literal["full", "selective"] | None, every: int = 1) -> None:
        """Compute every so many-th block again in the backward pass, `selective` without its products and attention."""
        self.model.recompute = Recompute(what, every) if what else None

    def forward(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        position_ids: Tensor,
        label_positions: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """Encode packed documents.

        With `label_positions` the last layer is computed for these tokens only. They see what they would see in a whole
        layer, whose other states nothing reads: after the last layer no token looks at another.

        Args:
            input_ids: (T,) integer token ids.
            cu_seqlens: (N + 1,) int32 document boundaries from 0 to T.
            position_ids: (T,) integer position of a token in its document.
            label_positions: (M,) int64 tokens whose states are wanted, ascending, also repeatedly; None for all.
            max_seqlen: Tokens of the longest document. Without it a GPU is asked, which it has to be waited for.

        Returns:
            The normalised hidden states, (T, E), or (M, E) of `label_positions`; fp32 under autocast.
        """
        hidden: Tensor = self.model(input_ids, AttentionLayout(cu_seqlens, max_seqlen), position_ids, label_positions)
        return hidden

    def transform(self, hidden: Tensor) -> Tensor:
        """Return what the head's matrix reads: the hidden states as they are."""
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the scores of every row of the vocabulary, the inert ones too, (T, V)."""
        logits = F.linear(hidden, self.head_weight, self.head_bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def _norm(config: NeoBertConfig) -> nn.Module:
    norm = RMSNorm if config.rms_norm else LayerNorm
    return norm(config.hidden_size, eps=config.norm_eps)


def _gelu(size: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(size, hidden, bias=False), nn.GELU(), nn.Linear(hidden, size, bias=False))


_FEED_FORWARDS = {"swiglu": SwiGLU, "gelu": _gelu}  # by `hidden_act`, as their matrices in architecture.py


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)
