"""What the training loop asks of an engine. The loop knows nothing else of how a model is spread over ranks.

The trained state has a name for each tensor: a weight goes under its parameter's name, AdamW's moments under
`exp_avg.<parameter>` and `exp_avg_sq.<parameter>`. All are whole and fp32, so that any engine on any number of ranks
can continue what another one saved.
"""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


def state_names(weights: list[str]) -> list[str]:
    """Return the names of all tensors of the state, in the order in which engines go through them."""
    return weights + [f"{moment}.{name}" for name in weights for moment in MOMENTS]


class Engine(Protocol):
    """Forward, backward and update of one model on all ranks."""

    shapes: dict[str, tuple[int, ...]]
    """The whole shape of each weight, by name."""
    module: nn.Module
    """The objective as evaluation calls it. Every rank must call it equally often."""

    @property
    def optimizer_steps(self) -> int:
        """Updates that were really made."""

    def forward(self, batch: Any, last: bool) -> Any:
        """Run the objective; `last` marks the last microbatch of a step, after which gradients are reduced."""

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
        """Return copies on the CPU of those tensors of the state that this rank wants to keep; collective."""

    def load(self, tensor_of: Callable[[str], Tensor], optimizer_steps: int) -> None:
        """Take over a state, asking for each tensor once, in the order of `state_names`; collective."""
