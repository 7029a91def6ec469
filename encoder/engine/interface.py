"""What the training loop asks of an engine. The loop knows nothing else of how a model is spread over ranks."""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class NamedState:
    """The whole trained state by parameter name, so that any engine at any world size can continue it."""

    weights: dict[str, Tensor]  # fp32
    moments: dict[str, Tensor]  # "exp_avg.<name>" and "exp_avg_sq.<name>", fp32
    optimizer_steps: int  # updates that were really made


class Engine(Protocol):
    """Forward, backward and update of one model on all ranks."""

    name: str

    def forward(self, batch: Any, last: bool) -> Any:
        """Run the objective; `last` marks the last microbatch of a step, after which gradients are reduced."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of `loss`, this rank's share of the global mean."""

    def step(self, lr: float) -> float:
        """Update with the accumulated gradient and clear it; return its norm before clipping.

        A gradient with a non-finite norm changes nothing.
        """

    def warm_up(self, batch: Any) -> None:
        """Do once what would make the first step differ from later ones; leaves no trace in weights or gradients."""

    def state(self) -> NamedState:
        """Return the state; collective."""

    def load(self, state: NamedState) -> None:
        """Take over a state; collective."""
