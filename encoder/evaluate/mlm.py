"""Loss, accuracy and perplexity of masked tokens, with masks that are the same at every evaluation."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from enc.encoder.data.batches import EvalBatches
from enc.encoder.hardware import Hardware
from enc.encoder.ranks import Ranks


@dataclass(frozen=True)
class MlmEvaluation:
    """Gives eval_loss (nats a label), eval_loss_bits, eval_accuracy, eval_perplexity, eval_labels and eval_batches.

    They are of all ranks; `prefix` stands in the place of `eval`, and at most `max_batches` are looked at.

    Batch i goes to rank i modulo the world size; in the last round a rank without one computes the last batch again and
    drops it. Ranks agree on `should_stop` before each round.
    """

    batches: EvalBatches
    prefix: str = "eval"
    max_batches: int | None = None

    def describe(self) -> str:
        return f"{len(self.batches.rows)} rows"

    def __call__(
        self, module: nn.Module, ranks: Ranks, hardware: Hardware, should_stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        module.eval()
        try:
            sums = self._sums(module, ranks, hardware, should_stop)
        finally:
            module.train()
        return None if sums is None else self._metrics(*ranks.sum(*sums))

    @property
    def _count(self) -> int:
        return min(len(self.batches), self.max_batches or len(self.batches))

    def _sums(
        self, module: nn.Module, ranks: Ranks, hardware: Hardware, should_stop: Callable[[], bool]
    ) -> tuple[float, float, float] | None:
        """Return (sum of losses, right predictions, labels) of this rank; None after a stop."""
        loss_sum = num_correct = num_labels = 0.0
        for start in range(0, self._count, ranks.world_size):
            if ranks.any(should_stop()):
                return None
            index = start + ranks.rank
            batch = self.batches[min(index, self._count - 1)].to(hardware.device)
            with torch.no_grad():
                output = module(batch)
            if index < self._count:
                loss_sum += output.loss_sum.item()
                num_correct += output.num_correct.item()
                num_labels += batch.num_labels
        return loss_sum, num_correct, num_labels

    def _metrics(self, loss_sum: float, num_correct: float, num_labels: float) -> dict[str, float]:
        divisor = num_labels or math.nan  # batches of trainer.eval_max_batches without any
        loss = loss_sum / divisor
        metrics = {
            "loss": loss,
            "loss_bits": loss / math.log(2),
            "accuracy": num_correct / divisor,
            "perplexity": math.exp(min(loss, 700.0)),
            "labels": int(num_labels),
            "batches": self._count,
        }
        return {f"{self.prefix}_{name}": value for name, value in metrics.items()}
