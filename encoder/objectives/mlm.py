"""Masked language modelling, and what MPNet makes of it: cross-entropy of the labelled tokens.

The loss is a SUM over labels; `accumulate` divides by the label count of the whole global batch, so the gradient does
not depend on how the batch is split. Only labelled tokens go through the last layer and the output matrix, unless
`full_last_layer` asks for the states of every token or `full_logits` for the logits of every token too (the ablations
`trainer.last_layer_of_labels_only: false` and `trainer.masked_logits_only_loss: false`).

The batch decides what is learnt. Of permuted documents the labelled tokens are their queries, and the sum is MPNet's,
or with `plm` XLNet's (arXiv 2004.09297, §2.3): sum over predicted tokens t of -log P(x_zt | x_z<t, placeholders).

Legend: T tokens, M label positions, H hidden size, V vocabulary.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from enc.encoder.data.batches import Microbatch
from enc.encoder.objectives.interface import Passes, accumulate_in_one_pass
from enc.kernels.masked_ce import IGNORE_INDEX, MaskedCEOutput, from_logits, masked_ce


class MlmOutput(NamedTuple):
    """What one microbatch gives; a tuple, since engines look for tensors inside of it to hang their hooks on."""

    loss_sum: Tensor  # () fp32
    num_correct: Tensor  # () int64: labels whose token has the largest logit
    logsumexp_sum: Tensor  # () fp32: of the labels' logits


class MlmObjective(nn.Module):
    """A masked-language model with its loss, so that an engine can wrap both as one module.

    With `bf16` matrix products run in bfloat16 under autocast. It is entered here, inside of the engine's module, for
    DeepSpeed switches off one that surrounds it. `z_loss` and `label_smoothing` are in the loss while training only.
    """

    def __init__(
        self,
        model: Any,  # a MaskedLanguageModel
        num_tokens: int,
        *,
        full_logits: bool = False,
        full_last_layer: bool = False,
        bf16: bool = False,
        z_loss: float = 0.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.num_tokens = num_tokens
        self.full_logits = full_logits
        self.full_last_layer = full_last_layer or full_logits
        self.bf16 = bf16
        self.extra: dict[str, Any] = {"z_loss": z_loss, "label_smoothing": label_smoothing}

    def forward(self, batch: Microbatch) -> MlmOutput:
        device = batch.input_ids.device.type
        with torch.autocast(device, torch.bfloat16) if self.bf16 else nullcontext():
            loss = self._loss(batch)
        return MlmOutput(loss.loss, loss.num_correct, loss.logsumexp.sum())

    def accumulate(self, passes: Passes, microbatches: Sequence[Microbatch], size: float) -> dict[str, Tensor]:
        """Add up the gradient of a step in one pass; `size` is the number of its labels."""
        return accumulate_in_one_pass(passes, microbatches, size)

    def _loss(self, batch: Microbatch) -> MaskedCEOutput:
        model, extra = self.model, self.extra if self.training else {}
        positions = None if self.full_last_layer else batch.label_positions
        tokens = batch.input_ids, batch.cu_seqlens, batch.position_ids
        streams = {} if batch.streams is None else batch.streams._asdict()
        hidden = model(*tokens, label_positions=positions, max_seqlen=batch.max_seqlen, **streams)  # (T, H) or (M, H)
        head = model.head_weight, model.head_bias  # (V, H), (V,) or None
        if self.full_logits:
            logits = model.logits(hidden)[:, : self.num_tokens].float()  # (T, V)
            return from_logits(logits, _spread(batch), **extra)
        if positions is None:
            hidden = hidden.index_select(0, batch.label_positions)  # (M, H)
        hidden = model.transform(hidden)
        return masked_ce(hidden, *head, batch.label_ids, self.num_tokens, softcap=model.softcap, **extra)


def _spread(batch: Microbatch) -> Tensor:
    """Return the label of every token, (T,) int64, IGNORE_INDEX where there is none."""
    labelled = batch.label_ids != IGNORE_INDEX
    targets = torch.full_like(batch.input_ids, IGNORE_INDEX)
    targets[batch.label_positions[labelled]] = batch.label_ids[labelled]
    return targets
