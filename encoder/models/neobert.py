"""NeoBERT (arXiv 2502.19587) on flat tokens: a pre-norm encoder with rotary positions, RMSNorm and SwiGLU.

The block is ``x += wo(attention(norm(x)))`` and ``x += ffn(norm(x))``, followed by one norm after the last block.
Learned positions, LayerNorm, GELU and the nGPT block (arXiv 2410.01131) are options. Parameter names are those of the
public NeoBERT checkpoints, so their state dicts load as they are.

Shapes: T tokens, E hidden size, H heads, D head dim (E = H D), F feed-forward size, N documents, V embedding rows.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from enc.encoder.config import ModelConfig
from enc.encoder.keyed import torch_rng
from enc.encoder.models.layers import LayerNorm, RMSNorm, SwiGLU, attend, matmul_dtype, recomputed
from enc.encoder.sizes import feed_forward_width, padded_vocab_size
from enc.kernels.rope import rope_qkv, rotations

_NGPT_ALPHA = 0.05  # the step towards a block's output at the start of training


class NeoBertBlock(nn.Module):
    """One pre-norm layer, (T, E) to (T, E)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_heads, self.dropout_p = config.num_attention_heads, config.dropout_prob
        self.qkv = nn.Linear(size, 3 * size, bias=False)
        self.wo = nn.Linear(size, size, bias=False)
        self.ffn = _feed_forward(config)
        self.attention_norm = _norm(config)
        self.ffn_norm = _norm(config)

    def forward(self, x: Tensor, cu_seqlens: Tensor, turns: Tensor | None) -> Tensor:
        # The residual stream stays fp32 under autocast, as in NeoBERT: a bf16 sum over many layers loses small
        # updates. What leaves a norm has the dtype of the matmuls that read it.
        dtype = matmul_dtype(x)
        branch = self._dropout(self.attention(self.attention_norm(x, dtype=dtype), cu_seqlens, turns))
        x, normed = self.ffn_norm(x, branch, dtype)
        return x + self._dropout(self.ffn(normed))

    def attention(self, x: Tensor, cu_seqlens: Tensor, turns: Tensor | None) -> Tensor:
        q, k, v = _split_heads(self.qkv(x), self.num_heads, turns)
        return self.wo(attend(q, k, v, cu_seqlens, self.dropout_p if self.training else 0.0))

    def _dropout(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout_p, self.training) if self.dropout_p else x


class NGptBlock(nn.Module):
    """One layer of nGPT (arXiv 2410.01131, §2): states are unit vectors, and a layer moves them along the sphere.

    Unlike the paper, and like NeoBERT's own variant, weights are not normalised again after a step.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size, hidden = config.hidden_size, feed_forward_width(config)
        self.num_heads, self.dropout_p = config.num_attention_heads, config.dropout_prob
        self.base_scale = config.base_scale
        self.qkv = nn.Linear(size, 3 * size, bias=False)
        self.wo = nn.Linear(size, size, bias=False)
        self.c_fc = nn.Linear(size, 2 * hidden, bias=False)
        self.mlp_c_proj = nn.Linear(hidden, size, bias=False)
        # Scales are stored times `base_scale`, which sets their effective learning rate under Adam (§2.5).
        self.attn_alpha = nn.Parameter(torch.full((size,), config.base_scale))
        self.mlp_alpha = nn.Parameter(torch.full((size,), config.base_scale))
        self.sqk = nn.Parameter(torch.full((size,), config.base_scale))
        self.suv = nn.Parameter(torch.ones(2 * hidden))

    def forward(self, x: Tensor, cu_seqlens: Tensor, turns: Tensor | None) -> Tensor:
        x = self._move(x, self.attention(x, cu_seqlens, turns), self.attn_alpha)
        return self._move(x, self.ffn(x), self.mlp_alpha)

    def attention(self, x: Tensor, cu_seqlens: Tensor, turns: Tensor | None) -> Tensor:
        q, k, v = _split_heads(self.qkv(x), self.num_heads, turns)
        sqk = (self.sqk / self.base_scale).view(q.shape[1:])  # (H, D)
        q, k = ((sqk * _unit(t)).to(v.dtype) for t in (q, k))
        dropout_p = self.dropout_p if self.training else 0.0
        return self.wo(attend(q, k, v, cu_seqlens, dropout_p, scale=math.sqrt(q.shape[-1])))

    def ffn(self, x: Tensor) -> Tensor:
        u, v = (self.c_fc(x) * self.suv * math.sqrt(x.shape[-1])).chunk(2, dim=-1)  # (T, F) each
        return self.mlp_c_proj(u * F.silu(v))

    def _move(self, x: Tensor, target: Tensor, alpha: Tensor) -> Tensor:
        target = F.dropout(target, self.dropout_p, self.training) if self.dropout_p else target
        x, target = _unit(x), _unit(target.to(x.dtype))
        return _unit(x + (alpha * (_NGPT_ALPHA / self.base_scale)).abs() * (target - x))


class NeoBert(nn.Module):
    """The trunk: token ids (T,) to hidden states (T, E)."""

    def __init__(self, config: ModelConfig, num_rows: int) -> None:
        super().__init__()
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.encoder = nn.Embedding(num_rows, config.hidden_size)
        self.rope = config.rope
        if not config.rope:  # row 0 belongs to padding, which flat batches do not have
            self.positional_embedding = nn.Embedding(config.max_position_embeddings + 1, config.hidden_size)
        block = NGptBlock if config.ngpt else NeoBertBlock
        self.transformer_encoder = nn.ModuleList(block(config) for _ in range(config.num_hidden_layers))
        self.layer_norm = nn.Identity() if config.ngpt else _norm(config)
        self.recompute: Literal["full", "selective"] | None = None
        self.recompute_every = 1

    def forward(self, input_ids: Tensor, cu_seqlens: Tensor, position_ids: Tensor) -> Tensor:
        x = self.encoder(input_ids)  # (T, E)
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # engines may hold the weights in bf16
        if not self.rope:
            x = x + self.positional_embedding(position_ids + 1)
        turns = rotations(position_ids, self.head_dim) if self.rope else None  # (T, D / 2, 2)
        for index, block in enumerate(self.transformer_encoder):
            if self.recompute and index % self.recompute_every == 0 and torch.is_grad_enabled():
                x = recomputed(block, x, cu_seqlens, turns, selective=self.recompute == "selective")
            else:
                x = block(x, cu_seqlens, turns)
        return self.layer_norm(x)


class NeoBertForMaskedLM(nn.Module):
    """NeoBERT with its language-model head.

    The embedding has ``padded_vocab_size(num_tokens)`` rows; those from ``num_tokens`` on are inert: no token reads
    them and the loss leaves them out. A tied head has no parameter of its own: ``decoder`` is None and the state dict
    holds the tensor once, as ``model.encoder.weight``.

    Args:
        config: The model section of a run config.
        num_tokens: Tokens of the tokenizer.
    """

    def __init__(self, config: ModelConfig, num_tokens: int) -> None:
        super().__init__()
        num_rows = padded_vocab_size(num_tokens)
        self.num_tokens = num_tokens
        self.model = NeoBert(config, num_rows)
        tied = config.tie_word_embeddings and not config.ngpt
        self.decoder = None if tied else nn.Linear(config.hidden_size, num_rows, bias=config.decoder_bias)

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
        self.model.recompute, self.model.recompute_every = what, every

    def forward(self, input_ids: Tensor, cu_seqlens: Tensor, position_ids: Tensor) -> Tensor:
        """Encode packed documents.

        Args:
            input_ids: (T,) integer token ids.
            cu_seqlens: (N + 1,) int32 document boundaries from 0 to T.
            position_ids: (T,) integer position of a token in its document.

        Returns:
            The normalised hidden states, (T, E); fp32 under autocast.
        """
        return self.model(input_ids, cu_seqlens, position_ids)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the scores of every row of the vocabulary, the inert ones too, (T, V)."""
        return F.linear(hidden, self.head_weight, self.head_bias)


@torch.no_grad()
def init_weights(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter from its own name and the seed, so that neither order nor sharding matters.

    Matrices are uniform in +-``decoder_init_range``, embeddings in +-``embedding_init_range``; norms start as the
    identity and nGPT's scales at ``base_scale``.
    """
    for name, parameter in model.named_parameters():
        *_, owner, kind = name.split(".")
        if parameter.dim() == 2:
            embedding = owner in ("encoder", "positional_embedding")
            bound = config.embedding_init_range if embedding else config.decoder_init_range
            draw = torch.empty(parameter.shape).uniform_(-bound, bound, generator=torch_rng(seed, "init", name))
            parameter.copy_(draw)
        elif kind == "bias":
            parameter.zero_()
        else:
            parameter.fill_(config.base_scale if kind in ("attn_alpha", "mlp_alpha", "sqk") else 1.0)


def _norm(config: ModelConfig) -> nn.Module:
    norm = RMSNorm if config.rms_norm else LayerNorm
    return norm(config.hidden_size, eps=config.norm_eps)


def _feed_forward(config: ModelConfig) -> nn.Module:
    size, hidden = config.hidden_size, feed_forward_width(config)
    if config.hidden_act == "swiglu":
        return SwiGLU(size, hidden)
    return nn.Sequential(nn.Linear(size, hidden, bias=False), nn.GELU(), nn.Linear(hidden, size, bias=False))


def _split_heads(qkv: Tensor, num_heads: int, turns: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Split (T, 3 E), whose columns are q, k, v of head 0, then of head 1, ..., into three (T, H, D), rotated."""
    qkv = qkv.view(len(qkv), num_heads, 3, -1)  # (T, H, 3, D)
    if turns is None:
        q, k, v = qkv.unbind(2)
        return q, k, v
    return rope_qkv(qkv, turns)


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)
