"""NeoBERT for transformers: an encoder with rotary positions, RMSNorm and SwiGLU (https://arxiv.org/abs/2502.19587).

This file stands beside exported weights and needs only torch and transformers, 4.57 or newer. Load the folder with
``AutoModel.from_pretrained(folder, trust_remote_code=True)``, or with AutoModelForMaskedLM, SequenceClassification,
TokenClassification, QuestionAnswering or MultipleChoice. ``attn_implementation`` is "sdpa" (the default), "eager",
which alone can give ``output_attentions``, or "flash_attention_2", which computes no padding.

Shapes: B rows, S positions, E hidden size, H heads, D head dim (E = H D), V tokens.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

from enc.encoder.models.modeling_common import (
    HeadLinear,
    MaskedLM,
    MultipleChoice,
    PreTrainedConfig,
    QuestionAnswering,
    SequenceClassification,
    TokenClassification,
    init,
    keeps_attentions,
    positions_of,
    refuse_long,
    token_mask,
    visible_keys,
)


class NeoBERTConfig(PreTrainedConfig):
    """Architecture of a NeoBERT model.

    ``intermediate_size`` is the width before the SwiGLU rule: with "swiglu" the layer is 2/3 of it wide, rounded up to
    a multiple of 8. ``hidden_act`` is "swiglu" or "gelu"; ``rope`` false means learned positions; ``rms_norm`` false
    means LayerNorm.
    """

    model_type = "neobert"

    def __init__(
        self,
        vocab_size: int = 30522,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        max_position_embeddings: int = 512,
        hidden_act: str = "swiglu",
        rope: bool = True,
        rms_norm: bool = True,
        norm_eps: float = 1e-5,
        dropout_prob: float = 0.0,
        classifier_dropout: float = 0.1,
        embedding_init_range: float = 0.02,
        decoder_init_range: float = 0.02,
        classifier_init_range: float = 0.02,
        pad_token_id: int = 0,
        tie_word_embeddings: bool = True,
        decoder_bias: bool = False,
        final_logit_softcapping: float | None = None,
        **kwargs: Any,
    ) -> None:
        if hidden_act not in ("swiglu", "gelu"):
            raise ValueError(f"hidden_act must be 'swiglu' or 'gelu', not {hidden_act!r}")
        if hidden_size % (2 * num_attention_heads):
            raise ValueError(f"{num_attention_heads} heads do not divide hidden size {hidden_size} into even parts")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.hidden_act = hidden_act
        self.rope = rope
        self.rms_norm = rms_norm
        self.norm_eps = norm_eps
        self.dropout_prob = dropout_prob
        self.classifier_dropout = classifier_dropout
        self.embedding_init_range = embedding_init_range
        self.decoder_init_range = decoder_init_range
        self.classifier_init_range = classifier_init_range
        self.decoder_bias = decoder_bias
        self.final_logit_softcapping = final_logit_softcapping
        super().__init__(pad_token_id=pad_token_id, tie_word_embeddings=tie_word_embeddings, **kwargs)  # type: ignore[call-arg]


class NeoBERTRMSNorm(nn.Module):
    """RMSNorm in fp32, cast back before the weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()).to(x.dtype) * self.weight


class NeoBERTSwiGLU(nn.Module):
    """``w3(silu(w1 x) * w2 x)``."""

    def __init__(self, config: NeoBERTConfig) -> None:
        super().__init__()
        width = -(-int(2 * config.intermediate_size / 3) // 8) * 8
        self.w1 = nn.Linear(config.hidden_size, width, bias=False)
        self.w2 = nn.Linear(config.hidden_size, width, bias=False)
        self.w3 = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class NeoBERTBlock(GradientCheckpointingLayer):
    """One pre-norm layer, (B, S, E) to (B, S, E)."""

    def __init__(self, config: NeoBERTConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.config = config
        self.num_heads, self.dropout_prob = config.num_attention_heads, config.dropout_prob
        self.qkv = nn.Linear(size, 3 * size, bias=False)
        self.wo = nn.Linear(size, size, bias=False)
        self.ffn = _feed_forward(config)
        self.attention_norm = _norm(config)
        self.ffn_norm = _norm(config)
        self.dropout = nn.Dropout(config.dropout_prob)

    def forward(
        self, x: Tensor, mask: Tensor | None, turns: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor | None]:
        attended, weights = self.attention(self.attention_norm(x), mask, turns)
        x = x + self.dropout(attended)
        return x + self.dropout(self.ffn(self.ffn_norm(x))), weights

    def attention(
        self, x: Tensor, mask: Tensor | None, turns: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor | None]:
        qkv = self.qkv(x).view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)  # (B, H, S, 3 D)
        q, k, v = qkv.chunk(3, dim=-1)
        if turns is not None:
            q, k = _rotate(q, *turns), _rotate(k, *turns)
        out, weights = self.attend(q, k, v, mask)
        return self.wo(out.flatten(2)), weights

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the mixed values, (B, S, H, D), and from eager attention the weights, (B, H, S, S)."""
        kind, dropout_p = self.config._attn_implementation, self.dropout_prob if self.training else 0.0
        if kind == "sdpa":
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)
            return out.transpose(1, 2), None
        if kind == "eager":
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
            scores = scores if mask is None else scores.masked_fill(~mask, -math.inf)
            weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
            return (F.dropout(weights, dropout_p) @ v).transpose(1, 2), weights
        flash = ALL_ATTENTION_FUNCTIONS[kind]
        return flash(self, q, k, v, mask, dropout=dropout_p, is_causal=False)[0], None


class NeoBERTPreTrainedModel(PreTrainedModel):
    """What the models below share."""

    config_class = NeoBERTConfig
    encoder_class: type[PreTrainedModel]
    base_model_prefix = "model"
    _keys_to_ignore_on_load_unexpected = [r"^decoder\."]  # noqa: RUF012 (the head of a masked language model)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # losses are means: Trainer has to divide them when it accumulates
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules = ["NeoBERTBlock"]  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, HeadLinear):
            init.normal_(module.weight, std=self.config.classifier_init_range)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            bound = self.config.decoder_init_range
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            bound = self.config.embedding_init_range
            init.uniform_(module.weight, -bound, bound)
        elif isinstance(module, (nn.LayerNorm, NeoBERTRMSNorm)):
            init.ones_(module.weight)
            if isinstance(module, nn.LayerNorm):
                init.zeros_(module.bias)


class NeoBERTModel(NeoBERTPreTrainedModel):
    """The encoder: token ids (B, S) to normalised hidden states (B, S, E)."""

    def __init__(self, config: NeoBERTConfig) -> None:
        super().__init__(config)
        self.encoder: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        if not config.rope:  # row 0 belongs to padding
            self.positional_embedding = nn.Embedding(config.max_position_embeddings + 1, config.hidden_size)
        self.transformer_encoder = nn.ModuleList(NeoBERTBlock(config) for _ in range(config.num_hidden_layers))
        self.layer_norm = _norm(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Encode a padded batch.

        Args:
            input_ids: (B, S) token ids; or give ``inputs_embeds`` (B, S, E) instead.
            attention_mask: (B, S), 1 or True for tokens, 0 or False for padding; everything is a token when None.
            position_ids: (B, S) or (1, S); by default tokens are counted from 0, padding left out.
            output_hidden_states: Return the input of each layer and the final output, ``num_hidden_layers + 1`` states.
            output_attentions: Return the weights of each layer, (B, H, S, S); with eager attention only.
        """
        keep_attentions = keeps_attentions(self.config, output_attentions)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.encoder(input_ids) if inputs_embeds is None else inputs_embeds
        tokens = token_mask(attention_mask, x)
        positions = positions_of(tokens, x) if position_ids is None else position_ids
        turns = None
        if self.config.rope:
            turns = _rotations(positions, self.config.hidden_size // self.config.num_attention_heads)
        else:
            refuse_long(positions, self.config.max_position_embeddings)
            x = x + self.positional_embedding(positions + 1)
        mask = tokens
        if tokens is not None and self.config._attn_implementation in ("sdpa", "eager"):
            mask = visible_keys(tokens)
        states, attentions = [], []
        for block in self.transformer_encoder:
            states.append(x)
            x, weights = block(x, mask, turns)
            attentions.append(weights)
        x = self.layer_norm(x)
        keep = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return BaseModelOutput(
            last_hidden_state=x,
            hidden_states=(*states, x) if keep else None,
            attentions=tuple(attentions) if keep_attentions else None,
        )


NeoBERTPreTrainedModel.encoder_class = NeoBERTModel


class NeoBERTForMaskedLM(MaskedLM, NeoBERTPreTrainedModel):
    """Scores of the vocabulary, by the embedding when ``config.tie_word_embeddings``; labels as for tokens."""

    _tied_weights_keys = {"decoder.weight": "model.encoder.weight"}  # noqa: RUF012

    def add_head(self, config: NeoBERTConfig) -> None:
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=config.decoder_bias)

    def get_output_embeddings(self) -> nn.Linear:
        return self.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.decoder = new_embeddings

    def scores(self, hidden: Tensor) -> Tensor:
        logits, cap = self.decoder(hidden), self.config.final_logit_softcapping  # (B, S, V)
        return cap * torch.tanh(logits / cap) if cap else logits


class NeoBERTForSequenceClassification(SequenceClassification, NeoBERTPreTrainedModel):
    """A classifier of texts."""


class NeoBERTForTokenClassification(TokenClassification, NeoBERTPreTrainedModel):
    """A classifier of tokens."""


class NeoBERTForQuestionAnswering(QuestionAnswering, NeoBERTPreTrainedModel):
    """Where the answer begins and ends."""


class NeoBERTForMultipleChoice(MultipleChoice, NeoBERTPreTrainedModel):
    """Which of several texts is right."""


def _norm(config: NeoBERTConfig) -> nn.Module:
    norm = NeoBERTRMSNorm if config.rms_norm else nn.LayerNorm
    return norm(config.hidden_size, eps=config.norm_eps)


def _feed_forward(config: NeoBERTConfig) -> nn.Module:
    if config.hidden_act == "swiglu":
        return NeoBERTSwiGLU(config)
    size, width = config.hidden_size, config.intermediate_size
    return nn.Sequential(nn.Linear(size, width, bias=False), nn.GELU(), nn.Linear(width, size, bias=False))


def _rotations(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of each pair's angle, (B, 1, S, D / 2) fp32."""
    pairs = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    angles = positions[:, None, :, None].float() * 10000.0 ** (-pairs / head_dim)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn adjacent pairs of x (B, H, S, D), in fp32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)
