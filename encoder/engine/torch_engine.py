"""What DDP and FSDP share: PyTorch's optimizer on the model's own parameters, whole or sharded as DTensors."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from enc.encoder.engine.interface import MOMENTS
from enc.encoder.optim.adamw import make_optimizer
from enc.encoder.optim.config import OptimizerConfig


class TorchEngine:
    """Optimizer step and named state; subclasses wrap the objective and reduce gradients."""

    module: nn.Module

    def __init__(self, model: nn.Module, optimizer: OptimizerConfig, clip: float | None) -> None:
        """Train the parameters of `model`, which is sharded already if it will be."""
        self.parameters = dict(model.named_parameters())
        self.shapes = {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}
        self.optimizer = make_optimizer(optimizer, self.parameters)
        self.clip = clip
        for parameter in self.parameters.values():
            moments = {moment: torch.zeros_like(parameter) for moment in MOMENTS}
            self.optimizer.state[parameter] = {"step": torch.tensor(0.0, device=parameter.device), **moments}

    @property
    def optimizer_steps(self) -> int:
        return int(next(iter(self.optimizer.state.values()))["step"])

    def step(self, lr: float) -> float:
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = _whole(torch.nn.utils.get_total_norm(gradients))
        if torch.isfinite(norm):
            if self.clip:
                torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.clip, norm)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.item()

    def weight_norm(self) -> float:
        return _whole(torch.nn.utils.get_total_norm([p.detach() for p in self.parameters.values()])).item()

    def gather(self, keep: Callable[[str], bool]) -> dict[str, Tensor]:
        kept = {}
        for name, tensor in self._tensors():
            whole = _whole(tensor)
            if keep(name):
                kept[name] = whole.to("cpu", torch.float32, copy=True)
        return kept

    def load(self, tensor_of: Callable[[str], Tensor], optimizer_steps: int) -> None:
        for name, tensor in self._tensors():
            _copy(tensor_of(name), tensor)
        for entry in self.optimizer.state.values():
            entry["step"].fill_(optimizer_steps)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.parameters.items():
            yield name, parameter.detach()
        for name, parameter in self.parameters.items():
            for moment in MOMENTS:
                yield f"{moment}.{name}", self.optimizer.state[parameter][moment]


def _whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor; collective."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _copy(whole: Tensor, target: Any) -> None:
    """Copy a whole tensor, which every rank has, or the rows of it that this rank holds. Nothing is sent."""
    if not hasattr(target, "to_local"):
        target.copy_(whole)
        return
    mesh, own = target.device_mesh, target.to_local()
    rows = -(-len(whole) // mesh["shard"].size())  # FSDP cuts along the first axis
    start = rows * mesh.get_local_rank("shard")
    own.copy_(whole[start : start + len(own)])
