"""What the loop asks of an objective: a model with its loss, and how the microbatches of a step become one gradient."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor


class Passes(Protocol):
    """The passes of one step through the run's engine. Each microbatch has its own keyed dropout, whatever the pass."""

    def forward(self, index: int, batch: Any, last: bool) -> Any:
        """Return what the objective's module gives for microbatch `index`; `last` as in `Engine.forward`."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of `loss`, this rank's share of the step's loss."""


class Objective(Protocol):
    """A module that holds the model: a microbatch in, named sums out."""

    def accumulate(self, passes: Passes, microbatches: Sequence[Any], size: float) -> dict[str, Tensor]:
        """Add up the gradient of a step, the sum of its losses over all ranks divided by `size`.

        Returns this rank's sums, fp64 and detached: `loss_sum`, and what else the task logs, under the names of its
        record in `enc.encoder.tasks`.
        """


def accumulate_in_one_pass(passes: Passes, microbatches: Sequence[Any], size: float) -> dict[str, Tensor]:
    """Accumulate losses that do not know of each other: forward and backward of one microbatch after the other.

    The module gives a NamedTuple of sums with `loss_sum`.
    """
    sums: dict[str, Any] = {}
    for index, microbatch in enumerate(microbatches):
        last = index == len(microbatches) - 1
        output = passes.forward(index, microbatch, last)
        passes.backward(output.loss_sum / size, last)
        for name, part in output._asdict().items():
            sums[name] = sums.get(name, 0.0) + part.detach().double()
    return sums
