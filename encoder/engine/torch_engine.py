"""What DDP and FSDP share: PyTorch's optimizer on the model's own parameters, whole or sharded as DTensors."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from enc.encoder.models.architecture import Parameter
from enc.encoder.optim.config import OptimizerConfig
from enc.encoder.optim.make import make_optimizer
from enc.encoder.optim.state_spec import state_spec


class TorchEngine:
    """Optimizer step and named state; subclasses wrap the objective and reduce gradients."""

    module: nn.Module

    def __init__(
        self, model: nn.Module, known: Mapping[str, Parameter], optimizer: OptimizerConfig, clip: float | None
    ) -> None:
        """Train the parameters of `model`, which is sharded already if it will be."""
        self.parameters = dict(model.named_parameters())
        self.shapes = {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}
        self.spec = state_spec(optimizer, known)
        self.state_shapes = self.spec.tensors(self.shapes)
        self.optimizer = make_optimizer(optimizer, known, self.parameters)
        self.optimizer_steps = 0
        self.clip = clip
        for name, parameter in self.parameters.items():
            self.optimizer.state[parameter] = self._first_state(name, parameter)

    def _first_state(self, name: str, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return what the optimizer would make at its first update, so that it can be loaded before."""
        kinds = self.spec.state_of(name, self.shapes[name])
        state = {kind: torch.zeros_like(parameter) for kind in kinds}
        if self.spec.counts_steps(name):
            state["step"] = torch.tensor(0.0, device=parameter.device)
        return state

    def step(self, lr: float) -> float:
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = _whole(torch.nn.utils.get_total_norm(gradients))
        if torch.isfinite(norm):
            if self.clip:
                torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.clip, norm)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self.optimizer_steps += 1
        self.optimizer.zero_grad(set_to_none=True)
        return norm.item()

    def weight_norm(self) -> float:
        return _whole(torch.nn.utils.get_total_norm([p.detach() for p in self.parameters.values()])).item()

    def gather(self, keep: Callable[[str], bool]) -> dict[str, Tensor]:
        kept = {}
        for name in self.state_shapes:
            whole = _whole(self._tensor(name))
            if keep(name):
                kept[name] = whole.to("cpu", torch.float32, copy=True)
        return kept

    def load(self, tensor_of: Callable[[str], Tensor], optimizer_steps: int) -> None:
        for name in self.state_shapes:
            _copy(tensor_of(name), self._tensor(name))
        for entry in self.optimizer.state.values():
            if "step" in entry:
                entry["step"].fill_(optimizer_steps)
        self.optimizer_steps = optimizer_steps

    def _tensor(self, name: str) -> Tensor:
        """Return a tensor of the state, whole or sharded as its parameter is."""
        if name in self.parameters:
            return self.parameters[name].detach()
        kind, _, parameter = name.partition(".")
        kept: Tensor = self.optimizer.state[self.parameters[parameter]][kind]
        return kept


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
