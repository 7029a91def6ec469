"""What the modelling files for transformers share: heads, masks, and what differs between transformers 4 and 5.

This file stands beside exported weights and the modelling file that imports it; both need torch and transformers only.

Shapes: B rows, S positions, E hidden size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import (
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils import ModelOutput, can_return_tuple

try:
    from transformers import PreTrainedConfig as PreTrainedConfig
    from transformers import initialization as init
except ImportError:  # transformers 4
    from torch.nn import init as init  # type: ignore[no-redef]
    from transformers import PretrainedConfig as PreTrainedConfig  # noqa: F401


class HeadLinear(nn.Linear):
    """A linear layer of a head, whose first weights are those of heads."""


class ClassificationHead(nn.Module):
    """Dropout, dense, tanh, dropout, linear, on the first token: (B, S, E) to (B, num_labels)."""

    def __init__(self, config: Any, num_labels: int) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.dense = HeadLinear(config.hidden_size, config.hidden_size)
        self.out_proj = HeadLinear(config.hidden_size, num_labels)

    def forward(self, hidden: Tensor) -> Tensor:
        first = self.dropout(hidden[:, 0])
        return self.out_proj(self.dropout(torch.tanh(self.dense(first))))


class Headed(nn.Module):
    """An encoder below a head, before a PreTrainedModel in the bases of a model.

    All new weights of a head have one name, `classifier` or `qa_outputs`, by which PEFT saves them beside an adapter.
    """

    config: Any
    encoder_class: Any
    base_model_prefix: str
    post_init: Any
    add_head: Any
    output_class: Any = ModelOutput

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        setattr(self, self.base_model_prefix, self.encoder_class(config))
        self.add_head(config)
        self.post_init()

    def encode(self, input_ids: Tensor | None, attention_mask: Tensor | None, options: dict[str, Any]) -> Any:
        return getattr(self, self.base_model_prefix)(input_ids, attention_mask, return_dict=True, **options)


class Labelled(Headed):
    """A model whose states are scored and compared with labels."""

    scores: Any

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """Score a padded batch, which is encoded as the encoder says; ``labels``, as the class says, give the loss."""
        output = self.encode(input_ids, attention_mask, kwargs)
        logits = self.scores(output.last_hidden_state)
        loss = None if labels is None else self.loss(logits, labels)
        return self.output_class(loss, logits, output.hidden_states, output.attentions)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten())


class MaskedLM(Labelled):
    """Scores of the vocabulary, (B, S, V); labels (B, S) with -100 for ignored."""

    output_class = MaskedLMOutput


class SequenceClassification(Labelled):
    """A classifier of texts; labels are (B,) classes, (B,) floats to regress, or (B, num_labels) 0/1 floats."""

    output_class = SequenceClassifierOutput

    def add_head(self, config: Any) -> None:
        self.classifier = ClassificationHead(config, self.num_labels)

    def scores(self, hidden: Tensor) -> Tensor:
        return self.classifier(hidden)  # (B, num_labels)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        kind = self.config.problem_type
        if kind == "regression" or (kind is None and self.num_labels == 1):
            return F.mse_loss(logits.squeeze(-1).float(), labels.float())
        if kind == "multi_label_classification" or (kind is None and labels.is_floating_point()):
            return F.binary_cross_entropy_with_logits(logits.float(), labels.float())
        return F.cross_entropy(logits.float(), labels)


class TokenClassification(Labelled):
    """A classifier of tokens: dropout, linear; labels (B, S) with -100 for ignored."""

    output_class = TokenClassifierOutput

    def add_head(self, config: Any) -> None:
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = HeadLinear(config.hidden_size, self.num_labels)

    def scores(self, hidden: Tensor) -> Tensor:
        return self.classifier(self.dropout(hidden))  # (B, S, num_labels)


class QuestionAnswering(Headed):
    """Scores of each token to begin and to end the answer."""

    def add_head(self, config: Any) -> None:
        self.qa_outputs = HeadLinear(config.hidden_size, 2)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput:
        """Score the ends of a span; positions are (B,), those beyond the row are ignored."""
        output = self.encode(input_ids, attention_mask, kwargs)
        start, end = self.qa_outputs(output.last_hidden_state).unbind(-1)  # (B, S) each
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = (_place_loss(start, start_positions) + _place_loss(end, end_positions)) / 2
        return QuestionAnsweringModelOutput(loss, start, end, output.hidden_states, output.attentions)


class MultipleChoice(Headed):
    """A score for each of C texts a row."""

    def add_head(self, config: Any) -> None:
        self.classifier = ClassificationHead(config, 1)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MultipleChoiceModelOutput:
        """Score the texts (B, C, S) of each row; ``labels`` (B,) say which is right."""
        mask = None if attention_mask is None else attention_mask.flatten(0, 1)
        output = self.encode(input_ids.flatten(0, 1), mask, kwargs)
        logits = self.classifier(output.last_hidden_state).view(input_ids.shape[:2])  # (B, C)
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return MultipleChoiceModelOutput(loss, logits, output.hidden_states, output.attentions)


def _place_loss(scores: Tensor, places: Tensor) -> Tensor:
    beyond = scores.shape[1]
    return F.cross_entropy(scores.float(), places.clamp(0, beyond), ignore_index=beyond)


def keeps_attentions(config: Any, asked: bool | None) -> bool:
    """Tell whether attention weights are to be returned. Raises ValueError where they are never made."""
    keep = bool(config.output_attentions if asked is None else asked)
    if keep and config._attn_implementation != "eager":
        raise ValueError(
            f"output_attentions: {config._attn_implementation} attention does not keep its weights. Load the model "
            "with attn_implementation='eager', or call model.set_attn_implementation('eager') first."
        )
    return keep


def token_mask(attention_mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Return an attention mask (B, S) as bool, on the device of x (B, S, E)."""
    if attention_mask is None:
        return None
    if attention_mask.shape != x.shape[:2]:
        raise ValueError(f"attention_mask must be {tuple(x.shape[:2])} of 0 and 1, not {tuple(attention_mask.shape)}")
    return attention_mask.to(device=x.device, dtype=torch.bool)


def positions_of(tokens: Tensor | None, x: Tensor) -> Tensor:
    """Count the tokens of a row from 0; padding gets -1, whose row of a table no token reads."""
    if tokens is None:
        return torch.arange(x.shape[1], device=x.device).unsqueeze(0)  # (1, S)
    return tokens.long().cumsum(-1) * tokens - 1  # (B, S); long: ONNX has no sum of bools


def refuse_long(positions: Tensor, longest: int) -> None:
    """Raise ValueError for a text that is longer than the table of positions."""
    if torch.compiler.is_compiling() or positions.shape[-1] <= longest:
        return
    if positions.max() >= longest:
        raise ValueError(
            f"a text has {int(positions.max()) + 1} tokens, the model has positions for {longest}: let the tokenizer "
            "cut it, with truncation=True"
        )


def visible_keys(tokens: Tensor) -> Tensor:
    """Return which keys may be seen, (B, 1, 1, S). A row of padding alone sees all of it: no softmax over nothing."""
    return (tokens | ~tokens.any(-1, keepdim=True))[:, None, None, :]
