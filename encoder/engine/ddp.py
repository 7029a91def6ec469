"""A whole copy of the model on each rank, gradients summed over ranks; one rank needs no process group."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from enc.encoder.config import OptimizerConfig
from enc.encoder.engine.interface import NamedState
from enc.encoder.optim.adamw import make_optimizer

_MOMENTS = ("exp_avg", "exp_avg_sq")


class DdpEngine:
    """Engine for models that fit on one device."""

    name = "ddp"

    def __init__(
        self, objective: nn.Module, model: nn.Module, optimizer: OptimizerConfig, clip: float | None, world_size: int
    ) -> None:
        """Wrap `objective`, which holds `model`, whose parameters are trained and saved under their own names."""
        self.parameters = dict(model.named_parameters())
        self.optimizer = make_optimizer(optimizer, self.parameters)
        self.clip = clip
        self.world_size = world_size
        self.module: nn.Module = objective
        if world_size > 1:
            self.module = DistributedDataParallel(objective, gradient_as_bucket_view=True)
        self._load_moments(dict.fromkeys(_moment_names(self.parameters)), 0)

    def forward(self, batch: Any, last: bool) -> Any:
        with self._reduction(last):
            return self.module(batch)

    def backward(self, loss: Tensor, last: bool) -> None:
        with self._reduction(last):
            torch.autograd.backward(loss * self.world_size)  # DDP averages over ranks; the losses are shares of one sum

    def _reduction(self, last: bool) -> Any:
        if isinstance(self.module, DistributedDataParallel) and not last:
            return self.module.no_sync()
        return nullcontext()

    def step(self, lr: float) -> float:
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if torch.isfinite(norm):
            if self.clip is not None:
                torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.clip, norm)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.item()

    def warm_up(self, batch: Any) -> None:
        """Let DDP see one backward pass: it regroups its buckets after the first, which changes the order of sums."""
        if self.world_size > 1:
            self.backward(self.forward(batch, last=True).loss_sum * 0.0, last=True)
            self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> NamedState:
        moments = {
            f"{kind}.{name}": self.optimizer.state[parameter][kind].detach()
            for name, parameter in self.parameters.items()
            for kind in _MOMENTS
        }
        steps = int(next(iter(self.optimizer.state.values()))["step"])
        return NamedState({name: p.detach() for name, p in self.parameters.items()}, moments, steps)

    def load(self, state: NamedState) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state.weights[name])
        self._load_moments(state.moments, state.optimizer_steps)

    def _load_moments(self, moments: Mapping[str, Tensor | None], steps: int) -> None:
        for name, parameter in self.parameters.items():
            entry: dict[str, Tensor] = {"step": torch.tensor(float(steps), device=parameter.device)}
            for kind in _MOMENTS:
                value = moments[f"{kind}.{name}"]
                entry[kind] = torch.zeros_like(parameter) if value is None else value.to(parameter.device).clone()
            self.optimizer.state[parameter] = entry


def _moment_names(parameters: dict[str, nn.Parameter]) -> list[str]:
    return [f"{kind}.{name}" for name in parameters for kind in _MOMENTS]
