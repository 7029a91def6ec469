"""A whole copy of the model on each rank, gradients summed over ranks; one rank needs no process group."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from enc.encoder.engine.interface import nothing_of
from enc.encoder.engine.torch_engine import TorchEngine
from enc.encoder.models.architecture import Parameter
from enc.encoder.optim.config import OptimizerConfig


class DdpEngine(TorchEngine):
    """Engine for models that fit on one device."""

    def __init__(
        self,
        objective: nn.Module,
        model: nn.Module,
        known: Mapping[str, Parameter],
        optimizer: OptimizerConfig,
        clip: float | None,
        world_size: int,
    ) -> None:
        """Wrap `objective`, which holds `model`, whose parameters are trained and saved under their own names."""
        super().__init__(model, known, optimizer, clip)
        self.world_size = world_size
        self.module = objective
        self.reducer = DistributedDataParallel(objective, gradient_as_bucket_view=True) if world_size > 1 else None

    def forward(self, batch: Any, last: bool) -> Any:
        with self._reduction(last):
            return self.module(batch) if self.reducer is None else self.reducer(batch)

    def backward(self, loss: Tensor, last: bool) -> None:
        with self._reduction(last):
            torch.autograd.backward(loss * self.world_size)  # DDP averages over ranks; the losses are shares of one sum

    def _reduction(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if self.reducer is None or last else self.reducer.no_sync()

    def warm_up(self, batch: Any) -> None:
        """Let DDP see one backward pass: it regroups its buckets after the first, which changes the order of sums."""
        if self.reducer is not None:
            self.backward(nothing_of(self.forward(batch, last=True)), last=True)
            self.optimizer.zero_grad(set_to_none=True)
