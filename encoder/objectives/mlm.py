"""Masked language modelling: cross-entropy of the labelled tokens.

The loss is a SUM over labels; whoever calls backward divides by the label count of the whole global batch, so the
gradient does not depend on how the batch is split. Only labelled rows go through the output matrix, unless
`full_logits` asks for the logits of every token (the ablation `trainer.masked_logits_only_loss: false`).

Legend: T tokens, M label places, H hidden size, V vocabulary rows.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from enc.encoder.data.batches import IGNORE, Microbatch
from enc.encoder.models.neobert import NeoBertForMaskedLM
from enc.kernels.masked_ce import from_logits, masked_ce


class MlmOutput(NamedTuple):
    """What one microbatch gives; a tuple, since engines look for tensors inside of it to hang their hooks on."""

    loss_sum: Tensor  # () fp32
    num_correct: Tensor  # () int64: labels whose token has the largest logit


class MlmObjective(nn.Module):
    """A masked-language model with its loss, so that an engine can wrap both as one module.

    With `bf16` matrix products run in bfloat16 under autocast. It is entered here, inside of the engine's module, for
    DeepSpeed switches off one that surrounds it.
    """

    def __init__(
        self,
        model: NeoBertForMaskedLM,
        num_tokens: int,
        full_logits: bool = False,
        bf16: bool = False,
        z_loss: float = 0.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.num_tokens = num_tokens
        self.full_logits = full_logits
        self.bf16 = bf16
        self.z_loss = z_loss
        self.label_smoothing = label_smoothing

    def forward(self, batch: Microbatch) -> MlmOutput:
        device = batch.input_ids.device.type
        with torch.autocast(device, torch.bfloat16) if self.bf16 else nullcontext():
            return self._loss(batch)

    def _loss(self, batch: Microbatch) -> MlmOutput:
        hidden = self.model(batch.input_ids, batch.cu_seqlens, batch.position_ids)  # (T, H)
        decoder, bias = self.model.head_weight, self.model.head_bias  # (V, H), (V,) or None
        if self.full_logits:
            return self._from_all_logits(hidden, batch)
        rows = hidden.index_select(0, batch.label_positions)  # (M, H)
        loss = masked_ce(
            rows, decoder, bias, batch.label_ids, self.num_tokens,
            z_loss=self.z_loss, label_smoothing=self.label_smoothing,
        )  # fmt: skip
        return MlmOutput(loss.loss, loss.num_correct)

    def _from_all_logits(self, hidden: Tensor, batch: Microbatch) -> MlmOutput:
        logits = self.model.logits(hidden)[:, : self.num_tokens].float()  # (T, V)
        labelled = batch.label_ids != IGNORE
        targets = torch.full_like(batch.input_ids, IGNORE)
        targets[batch.label_positions[labelled]] = batch.label_ids[labelled]
        loss = from_logits(logits, targets, self.z_loss, self.label_smoothing)
        return MlmOutput(loss.loss, loss.num_correct)
