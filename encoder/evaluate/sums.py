"""An evaluation by what an objective gives for each held-out batch, added up."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from enc.encoder.data.batches import EvalBatches
from enc.encoder.hardware import Hardware
from enc.encoder.ranks import Ranks


@dataclass(frozen=True)
class HeldOutSums:
    """The `Evaluation` that adds up what the objective gives for each batch, over all ranks.

    `metrics` makes numbers of the sums, which have the names of the objective's output, and `size` and `batches`. They
    are given as `<prefix>_<name>`. At most `max_batches` are looked at.

    Batch i goes to rank i modulo the world size; in the last round a rank without one computes the last batch again and
    drops it. Ranks agree on `should_stop` before each round.
    """

    batches: EvalBatches
    metrics: Callable[[Counter[str]], dict[str, float]]
    prefix: str = "eval"
    max_batches: int | None = None

    def describe(self) -> str:
        return f"{len(self.batches.rows)} rows"

    def __call__(
        self, module: nn.Module, ranks: Ranks, hardware: Hardware, should_stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        module.eval()
        try:
            own = self._sums(module, ranks, hardware, should_stop)
        finally:
            module.train()
        if own is None:
            return None
        sums = Counter(dict(zip(own, ranks.sum(*own.values()), strict=True)))
        return {f"{self.prefix}_{name}": value for name, value in self.metrics(sums).items()}

    @property
    def num_batches(self) -> int:
        return min(len(self.batches), self.max_batches or len(self.batches))

    def _sums(
        self, module: nn.Module, ranks: Ranks, hardware: Hardware, should_stop: Callable[[], bool]
    ) -> dict[str, float] | None:
        """Return the sums of this rank; None after a stop."""
        sums: dict[str, float] = {}
        for start in range(0, self.num_batches, ranks.world_size):
            if ranks.any(should_stop()):
                return None
            index = start + ranks.rank
            batch = self.batches[min(index, self.num_batches - 1)].to(hardware.device)
            with torch.no_grad():
                output = module(batch)
            found = {name: part.item() for name, part in output._asdict().items()}
            counts = index < self.num_batches
            for name, value in {**found, "size": batch.sizes.size, "batches": 1}.items():
                sums[name] = sums.get(name, 0.0) + (value if counts else 0.0)
        return sums
