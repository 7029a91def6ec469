"""What the loop asks of an evaluation."""

from collections.abc import Callable
from typing import Protocol

from torch import nn

from enc.encoder.hardware import Hardware
from enc.encoder.ranks import Ranks


class Evaluation(Protocol):
    """Metrics of something held out, always the same thing."""

    def __call__(
        self, module: nn.Module, ranks: Ranks, hardware: Hardware, should_stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """Return metrics by name, the same on all ranks; None when it was broken off. Collective.

        Ranks agree on `should_stop` now and then, and call the objective's `module` equally often, since engines that
        shard weights need all of them.
        """

    @property
    def num_batches(self) -> int:
        """How many batches it looks at."""
        ...

    def describe(self) -> str:
        """Say on how much."""
