"""Loss, accuracy and perplexity of masked tokens, with masks that are the same at every evaluation."""

import math
from collections.abc import Callable

import torch
from torch import nn

from enc.encoder.data.batches import EvalBatches
from enc.encoder.hardware import Hardware
from enc.encoder.ranks import Ranks


def evaluate_mlm(
    objective: nn.Module,
    batches: EvalBatches,
    ranks: Ranks,
    hardware: Hardware,
    max_batches: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    prefix: str = "eval",
) -> dict[str, float] | None:
    """Return eval_loss (nats a label), eval_loss_bits, eval_accuracy, eval_perplexity, eval_labels and eval_batches.

    They are of all ranks; `prefix` stands in the place of `eval`.

    Batch i goes to rank i modulo the world size; in the last round a rank without one computes the last batch again and
    drops it, since engines that shard weights need all ranks. Ranks agree on `should_stop` before each round; None
    means that the evaluation was broken off.
    """
    count = min(len(batches), max_batches or len(batches))
    loss_sum = num_correct = num_labels = 0.0
    objective.eval()
    try:
        for start in range(0, count, ranks.world_size):
            if ranks.any(should_stop()):
                return None
            index = start + ranks.rank
            batch = batches[min(index, count - 1)].to(hardware.device)
            with torch.no_grad():
                output = objective(batch)
            if index >= count:
                continue
            loss_sum += output.loss_sum.item()
            num_correct += output.num_correct.item()
            num_labels += batch.num_labels
    finally:
        objective.train()
    loss_sum, num_correct, num_labels = ranks.sum(loss_sum, num_correct, num_labels)
    num_labels = num_labels or math.nan  # batches of trainer.eval_max_batches without any
    loss = loss_sum / num_labels
    metrics = {
        "loss": loss,
        "loss_bits": loss / math.log(2),
        "accuracy": num_correct / num_labels,
        "perplexity": math.exp(min(loss, 700.0)),
        "labels": 0 if math.isnan(num_labels) else int(num_labels),
        "batches": count,
    }
    return {f"{prefix}_{name}": value for name, value in metrics.items()}
