"""Loss, accuracy and perplexity of masked tokens."""

import math
from collections import Counter


def mlm_metrics(sums: Counter[str]) -> dict[str, float]:
    """Return loss (nats a label), loss_bits, accuracy, perplexity, labels and batches of summed `MlmOutput`s."""
    divisor = sums["size"] or math.nan  # batches of trainer.eval_max_batches without any
    loss = sums["loss_sum"] / divisor
    return {
        "loss": loss,
        "loss_bits": loss / math.log(2),
        "accuracy": sums["num_correct"] / divisor,
        "perplexity": math.exp(min(loss, 700.0)),
        "labels": int(sums["size"]),
        "batches": int(sums["batches"]),
    }
