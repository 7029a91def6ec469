"""Forward and backward passes of a step through the run's engine, with dropout that has a key, and timed."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from enc.encoder.data.interface import Batch
from enc.encoder.engine.interface import Engine
from enc.encoder.keyed import set_global_seed
from enc.encoder.run.stopwatch import Stopwatch


@dataclass
class EnginePasses:
    """The `Passes` that an objective accumulates with. Dropout is keyed by (seed, step, microbatch, rank)."""

    engine: Engine
    device: torch.device
    watch: Stopwatch
    seed: int
    rank: int
    step: int = 0

    def at(self, step: int) -> "EnginePasses":
        """Return the passes of a step."""
        self.step = step
        return self

    def forward(self, index: int, batch: Batch, last: bool) -> Any:
        set_global_seed(self.seed, "dropout", self.step, index, self.rank)
        with self.watch("forward"):
            return self.engine.forward(batch.to(self.device), last)

    def backward(self, loss: Tensor, last: bool) -> None:
        with self.watch("backward"):
            self.engine.backward(loss, last)
