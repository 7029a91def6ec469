"""An optimizer that keeps one tensor for a matrix and two for anything else, in place of the package's Adam."""

import pytest
import torch
from torch import nn

from enc.encoder.models.architecture import Parameter
from enc.encoder.optim import make, state_spec
from enc.encoder.optim.config import OptimizerConfig
from enc.encoder.optim.state_spec import Kept

MATRIX, OTHER = Kept(("momentum",), counts_steps=False), Kept(("first", "second"))


class Mixed(torch.optim.Optimizer):
    """Momentum for the group of matrices; for the other group Adam without bias correction, which counts steps."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                state = self.state[parameter]
                for kind in group["kept"].kinds:
                    state.setdefault(kind, torch.zeros_like(parameter))
                if group["kept"] is MATRIX:
                    update = state["momentum"].mul_(0.9).add_(parameter.grad)
                else:
                    state.setdefault("step", torch.zeros(())).add_(1)
                    state["second"].mul_(0.99).addcmul_(parameter.grad, parameter.grad, value=0.01)
                    update = state["first"].lerp_(parameter.grad, 0.1) / (state["second"].sqrt() + 1e-8)
                parameter.sub_(update, alpha=group["lr"])


def kept(_config: OptimizerConfig, parameter: Parameter) -> Kept:
    return MATRIX if len(parameter.shape) == 2 else OTHER


def mixed(config: OptimizerConfig, trained: make.Trained) -> torch.optim.Optimizer:
    groups: dict[Kept, list[nn.Parameter]] = {}
    for parameter, known in trained:
        groups.setdefault(kept(config, known), []).append(parameter)
    return Mixed([{"params": params, "kept": of_kind} for of_kind, params in groups.items()], {"lr": config.lr})


def put_in(patch: pytest.MonkeyPatch) -> None:
    """Let `optimizer.name: adam` mean this optimizer."""
    patch.setitem(state_spec._RULES, "adam", kept)
    patch.setitem(make._MAKERS, "adam", mixed)
