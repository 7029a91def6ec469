"""MPNet for transformers, with the choices that its own MPNet lacks (https://arxiv.org/abs/2004.09297).

These are norms before attention and feed-forward (``normalize_before``), the activation, which is the head's too, the
buckets of the relative bias, and padding with any id. Names of weights are those of transformers' MPNetForMaskedLM.

This file stands beside exported weights and needs only torch and transformers, 4.57 or newer. Load the folder with
``AutoModel.from_pretrained(folder, trust_remote_code=True)``, or with AutoModelForMaskedLM, SequenceClassification,
TokenClassification, QuestionAnswering or MultipleChoice. ``attn_implementation`` is "sdpa" (the default) or "eager",
which alone can give ``output_attentions``; FlashAttention has no place for the relative bias.

Shapes: B rows, S positions, E hidden size, H heads, D head dim (E = H D), V tokens.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import can_return_tuple

from enc.encoder.models.modeling_common import (
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

POSITION_OFFSET = 2  # rows 0 and 1 of the position table belong to no position
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_accurate": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "silu": F.silu,
    "tanh": torch.tanh,
    "linear": lambda x: x,
}


class EncMPNetConfig(PreTrainedConfig):
    """Architecture of an MPNet. ``max_position_embeddings`` is the number of tokens of the longest text."""

    model_type = "enc_mpnet"

    def __init__(
        self,
        vocab_size: int = 30527,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        max_position_embeddings: int = 512,
        hidden_act: str = "gelu",
        normalize_before: bool = False,
        relative_attention_num_buckets: int = 32,
        relative_attention_max_distance: int = 128,
        norm_eps: float = 1e-5,
        dropout_prob: float = 0.1,
        attention_dropout_prob: float = 0.1,
        activation_dropout_prob: float = 0.1,
        classifier_dropout: float = 0.1,
        initializer_range: float = 0.02,
        pad_token_id: int = 1,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        if hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act must be one of {', '.join(ACTIVATIONS)}, not {hidden_act!r}")
        if hidden_size % num_attention_heads:
            raise ValueError(f"{num_attention_heads} heads do not divide hidden size {hidden_size}")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.hidden_act = hidden_act
        self.normalize_before = normalize_before
        self.relative_attention_num_buckets = relative_attention_num_buckets
        self.relative_attention_max_distance = relative_attention_max_distance
        self.norm_eps = norm_eps
        self.dropout_prob = dropout_prob
        self.attention_dropout_prob = attention_dropout_prob
        self.activation_dropout_prob = activation_dropout_prob
        self.classifier_dropout = classifier_dropout
        self.initializer_range = initializer_range
        super().__init__(pad_token_id=pad_token_id, tie_word_embeddings=tie_word_embeddings, **kwargs)  # type: ignore[call-arg]


class EncMPNetEmbeddings(nn.Module):
    """Normalised sum of token and position, (B, S) ids or (B, S, E) embeddings to (B, S, E)."""

    def __init__(self, config: EncMPNetConfig) -> None:
        super().__init__()
        rows = config.max_position_embeddings + POSITION_OFFSET
        self.word_embeddings: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(rows, config.hidden_size)
        self.LayerNorm = _norm(config)
        self.dropout = nn.Dropout(config.dropout_prob)

    def forward(self, embedded: Tensor, positions: Tensor) -> Tensor:
        return self.dropout(self.LayerNorm(embedded + self.position_embeddings(positions + POSITION_OFFSET)))


class EncMPNetAttention(nn.Module):
    """Attention with a bias, then a norm of its sum with the input; the norm stands before it in a pre-norm model."""

    def __init__(self, config: EncMPNetConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.config = config
        self.num_heads, self.dropout_prob = config.num_attention_heads, config.attention_dropout_prob
        self.attn = nn.ModuleDict({name: nn.Linear(size, size) for name in "qkvo"})
        self.LayerNorm = _norm(config)

    def forward(self, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the output, (B, S, E), and from eager attention the weights, (B, H, S, S)."""
        q, k, v = (self.attn[name](x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for name in "qkv")
        bias, dropout_p, weights = bias.to(q.dtype), self.dropout_prob if self.training else 0.0, None
        if self.config._attn_implementation == "eager":
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + bias
            weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
            out = F.dropout(weights, dropout_p) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p)
        side_by_side = torch.cat(out.unbind(1), dim=-1)  # a view would not outlive what ONNX makes of sdpa
        return self.attn["o"](side_by_side), weights


class EncMPNetIntermediate(nn.Module):
    """The first half of the feed-forward."""

    def __init__(self, config: EncMPNetConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.dropout = nn.Dropout(config.activation_dropout_prob)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.activation(self.dense(x)))


class EncMPNetOutput(nn.Module):
    """The second half of the feed-forward, and its norm."""

    def __init__(self, config: EncMPNetConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.intermediate_size, config.hidden_size)
        self.LayerNorm = _norm(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x)


class EncMPNetLayer(GradientCheckpointingLayer):
    """One layer, (B, S, E) to (B, S, E)."""

    def __init__(self, config: EncMPNetConfig) -> None:
        super().__init__()
        self.pre_norm = config.normalize_before
        self.attention = EncMPNetAttention(config)
        self.intermediate = EncMPNetIntermediate(config)
        self.output = EncMPNetOutput(config)
        self.dropout = nn.Dropout(config.dropout_prob)

    def forward(self, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.pre_norm:
            attended, weights = self.attention(self.attention.LayerNorm(x), bias)
            x = x + self.dropout(attended)
            return x + self.dropout(self.feed_forward(self.output.LayerNorm(x))), weights
        attended, weights = self.attention(x, bias)
        x = self.attention.LayerNorm(x + self.dropout(attended))
        return self.output.LayerNorm(x + self.dropout(self.feed_forward(x))), weights

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.output(self.intermediate(x))


class EncMPNetEncoder(nn.Module):
    """All layers, the table of the relative bias that they share, and the last norm of a pre-norm model."""

    def __init__(self, config: EncMPNetConfig) -> None:
        super().__init__()
        self.num_buckets, self.max_distance = (
            config.relative_attention_num_buckets,
            config.relative_attention_max_distance,
        )
        self.layer = nn.ModuleList(EncMPNetLayer(config) for _ in range(config.num_hidden_layers))
        self.relative_attention_bias = nn.Embedding(self.num_buckets, config.num_attention_heads)
        self.LayerNorm = _norm(config) if config.normalize_before else None

    def bias(self, positions: Tensor, tokens: Tensor | None) -> Tensor:
        """Return what is added to the scores, (B or 1, H, S, S): the relative bias, and -inf for padding."""
        distances = positions[:, None, :] - positions[:, :, None]  # (B, S, S), of keys from queries
        buckets = _buckets(distances, self.num_buckets, self.max_distance)
        bias = self.relative_attention_bias(buckets).permute(0, 3, 1, 2)
        if tokens is None:
            return bias
        return bias.masked_fill(~visible_keys(tokens), -torch.inf)


class EncMPNetPreTrainedModel(PreTrainedModel):
    """What the models below share."""

    config_class = EncMPNetConfig
    encoder_class: type[PreTrainedModel]
    base_model_prefix = "mpnet"
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]  # noqa: RUF012
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # losses are means: Trainer has to divide them when it accumulates
    _supports_sdpa = True
    _no_split_modules = ["EncMPNetLayer"]  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, EncMPNetLMHead):
            init.zeros_(module.bias)


class EncMPNetModel(EncMPNetPreTrainedModel):
    """The encoder: token ids (B, S) to hidden states (B, S, E)."""

    def __init__(self, config: EncMPNetConfig) -> None:
        super().__init__(config)
        self.embeddings = EncMPNetEmbeddings(config)
        self.encoder = EncMPNetEncoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.word_embeddings = value

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
        embedded = self.embeddings.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        tokens = token_mask(attention_mask, embedded)
        positions = positions_of(tokens, embedded) if position_ids is None else position_ids
        refuse_long(positions, self.config.max_position_embeddings)
        x = self.embeddings(embedded, positions)
        bias = self.encoder.bias(positions, tokens)
        states, attentions = [], []
        for layer in self.encoder.layer:
            states.append(x)
            x, weights = layer(x, bias)
            attentions.append(weights)
        x = x if self.encoder.LayerNorm is None else self.encoder.LayerNorm(x)
        keep = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return BaseModelOutput(
            last_hidden_state=x,
            hidden_states=(*states, x) if keep else None,
            attentions=tuple(attentions) if keep_attentions else None,
        )


class EncMPNetLMHead(nn.Module):
    """Dense, activation, norm, and a product with the embedding: (B, S, E) to (B, S, V)."""

    def __init__(self, config: EncMPNetConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.layer_norm = _norm(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.activation = ACTIVATIONS[config.hidden_act]

    def _tie_weights(self) -> None:  # transformers 4 asks for it; 5 goes by _tied_weights_keys
        self.decoder.bias = self.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.layer_norm(self.activation(self.dense(x))))


EncMPNetPreTrainedModel.encoder_class = EncMPNetModel


class EncMPNetForMaskedLM(MaskedLM, EncMPNetPreTrainedModel):
    """Scores of the vocabulary, by the embedding; labels (B, S) with -100 for ignored."""

    _tied_weights_keys = {  # noqa: RUF012
        "lm_head.decoder.weight": "mpnet.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    }

    def add_head(self, config: EncMPNetConfig) -> None:
        self.lm_head = EncMPNetLMHead(config)

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head.decoder = new_embeddings
        self.lm_head.bias = new_embeddings.bias

    def scores(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)


class EncMPNetForSequenceClassification(SequenceClassification, EncMPNetPreTrainedModel):
    """A classifier of texts."""


class EncMPNetForTokenClassification(TokenClassification, EncMPNetPreTrainedModel):
    """A classifier of tokens."""


class EncMPNetForQuestionAnswering(QuestionAnswering, EncMPNetPreTrainedModel):
    """Where the answer begins and ends."""


class EncMPNetForMultipleChoice(MultipleChoice, EncMPNetPreTrainedModel):
    """Which of several texts is right."""


def _norm(config: EncMPNetConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps)


def _buckets(distance: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """Return T5's bidirectional bucket of each distance: the first half for what lies before, the second for after."""
    half, exact = num_buckets // 2, num_buckets // 4
    size = distance.abs()
    # In fp32, as in training: a wider logarithm could move the first distance of a bucket.
    steps = torch.log(size.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (half - exact)
    bucket = torch.where(size < exact, size, (exact + steps.long()).clamp(max=half - 1))
    return bucket + half * (distance > 0)
