"""What the training loop asks of an engine. The loop knows nothing else of how a model is spread over ranks.

The trained state has a name for each tensor: a weight goes under its parameter's name, what the optimizer keeps for it
under `<kind>.<parameter>`, as `StateSpec` of encoder/optim says. All are whole and fp32, so that any engine on any
number of ranks can continue what another one saved.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn


def nothing_of(output: tuple[Any, ...]) -> Tensor:
    """Return a loss of zero that reaches all that an output of an objective depends on."""
    parts = [part.sum() * 0.0 for part in output if isinstance(part, Tensor) and part.requires_grad]
    return torch.stack(parts).sum()


class Engine(Protocol):
    """Forward, backward and update of one model on all ranks."""

    shapes: dict[str, tuple[int, ...]]
    """The whole shape of each weight, by name."""
    state_shapes: dict[str, tuple[int, ...]]
    """The whole shape of each tensor of the trained state, by name: weights first, in the order of `load`."""
    module: nn.Module
    """The objective as evaluation calls it. Every rank must call it equally often."""
    optimizer_steps: int
    """Updates that were really made."""

    def forward(self, batch: Any, last: bool) -> Any:
        """Run the objective, which gives a tuple.

        `last` marks the last microbatch of a step, after which gradients are reduced.
        """

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of `loss`, this rank's share of the global mean."""

    def step(self, lr: float) -> float:
        """Update with the accumulated gradient and clear it; return its norm before clipping.

        A gradient with a non-finite norm changes nothing.
        """

    def warm_up(self, batch: Any) -> None:
        """Do once, before `load`, what would make the first step differ from later ones."""

    def weight_norm(self) -> float:
        """Return the norm of all fp32 weights; collective."""

    def gather(self, keep: Callable[[str], bool]) -> dict[str, Tensor]:
        """Return those tensors of the state that this rank wants to keep: whole fp32 copies on the CPU, by name.

        Collective: every rank goes through all of `state_shapes` in their order, whatever it keeps.
        """

    def load(self, tensor_of: Callable[[str], Tensor], optimizer_steps: int) -> None:
        """Take over a state of so many updates; collective.

        `tensor_of(name)` gives the whole tensor, fp32, on the CPU and in the shape of `state_shapes`. It is asked for
        each name once, in their order, by every rank.
        """
