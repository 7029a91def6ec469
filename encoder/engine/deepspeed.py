"""DeepSpeed's ZeRO, stages 0 to 3, with or without offload to CPU memory.

DeepSpeed cuts the state into flat partitions; here it is read and written by parameter name. Two things are peculiar:

- what the optimizer keeps exists from the first update on, so `warm_up` makes one with a gradient of zero;
- the weights that the model computes with are copies of DeepSpeed's fp32 ones and follow them at the end of an update,
  so `load` writes both.
"""

import logging
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from enc.encoder.engine.interface import nothing_of
from enc.encoder.models.architecture import Parameter
from enc.encoder.optim.config import OptimizerConfig
from enc.encoder.optim.make import make_optimizer
from enc.encoder.optim.state_spec import state_spec


class DeepSpeedEngine:
    """Engine for models whose state does not fit on one device."""

    def __init__(
        self,
        objective: nn.Module,
        model: nn.Module,
        known: Mapping[str, Parameter],
        optimizer: OptimizerConfig,
        settings: dict[str, Any],
        device: torch.device,
    ) -> None:
        """Shard `objective`, which holds `model`, as `settings` say: the JSON made by `deepspeed_settings`."""
        self.deepspeed = _import_deepspeed(device)
        self.parameters: dict[str, Any] = dict(model.named_parameters())
        self.shapes = {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}
        self.state_shapes = state_spec(optimizer, known).tensors(self.shapes)
        self.optimizer_steps = 0
        self.stage = settings["zero_optimization"]["stage"]
        self.clip = settings["gradient_clipping"]
        engine, *_ = self.deepspeed.initialize(
            model=objective, optimizer=make_optimizer(optimizer, known, self.parameters), config=settings
        )
        self.module: Any = engine
        self.inner = engine.optimizer if self.stage == 0 else engine.optimizer.optimizer
        self.world_size = engine.world_size

    def forward(self, batch: Any, last: bool) -> Any:
        self.module.set_gradient_accumulation_boundary(last)
        return self.module(batch)

    def backward(self, loss: Tensor, last: bool) -> None:
        # DeepSpeed averages over ranks; the losses are shares of one sum.
        self.module.backward(loss * self.world_size, scale_wrt_gas=False)

    def step(self, lr: float) -> float:
        for group in self.module.optimizer.param_groups:
            group["lr"] = lr
        if self.stage > 0:
            self.module.step()  # skips an update whose norm is not finite
            self.optimizer_steps += self.module.was_step_applied()
            return float(self.module.get_global_grad_norm())
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])
        if torch.isfinite(norm):
            self.module.step()
            self.optimizer_steps += 1
        else:
            self.module.optimizer.zero_grad()
        return norm.item()

    def warm_up(self, batch: Any) -> None:
        """Make the optimizer's state exist, all zero: one update with no gradient at learning rate 0."""
        self.backward(nothing_of(self.forward(batch, last=True)), last=True)
        self.step(0.0)
        for tensor in (tensor for entry in self.inner.state.values() for tensor in entry.values()):
            if isinstance(tensor, Tensor):
                tensor.zero_()  # Adam, other than AdamW, adds its weight decay to the gradient
        if self.stage in (1, 2):
            # DeepSpeed names the state after the update of the first parameter group, before the others have any.
            self.module.optimizer._hp_optimizer_states_linked = False
            self.module.optimizer._lazy_init_hp_params_optimizer_state()
        self.optimizer_steps = 0

    def weight_norm(self) -> float:
        squares = torch.zeros((), dtype=torch.float64)
        for parameter in self.parameters.values():
            squares += self._own_fragment(parameter).double().square().sum().cpu()
        if self.stage > 0:
            torch.distributed.all_reduce(squares)
        return squares.sqrt().item()

    def _own_fragment(self, parameter: Any) -> Tensor:
        """Return what this rank holds of a weight in fp32."""
        own: Tensor
        if self.stage == 0:
            own = parameter.detach()
        elif self.stage == 3:
            part = self.deepspeed.utils.safe_get_local_fp32_param(parameter)
            left = parameter.ds_numel - part.numel() * self.module.global_rank
            own = part[: max(left, 0)]  # the last ranks' parts end in padding, which may hold anything
        else:
            mapping = parameter._hp_mapping  # None: the whole weight lies on other ranks
            own = parameter.new_zeros(0) if mapping is None else mapping.get_hp_fragment()
        return own

    def gather(self, keep: Callable[[str], bool]) -> dict[str, Tensor]:
        kept = {}
        for name in self.state_shapes:
            whole = self._get(*self._place(name))
            if keep(name):
                kept[name] = whole.detach().to("cpu", torch.float32, copy=True)
        return kept

    def load(self, tensor_of: Callable[[str], Tensor], optimizer_steps: int) -> None:
        for name in self.state_shapes:
            self._set(*self._place(name), tensor_of(name))
        for entry in self.inner.state.values():
            if "step" in entry:
                entry["step"].fill_(optimizer_steps)
        self.optimizer_steps = optimizer_steps

    def _place(self, name: str) -> tuple[Any, str | None]:
        """Return (parameter, kind of what is kept for it) of a tensor of the state; the kind of a weight is None."""
        if name in self.parameters:
            return self.parameters[name], None
        kind, _, parameter = name.partition(".")
        return self.parameters[parameter], kind

    def _get(self, parameter: Any, kind: str | None) -> Tensor:
        whole: Tensor
        if self.stage == 0:
            whole = parameter if kind is None else self.inner.state[parameter][kind]
        elif kind is None:
            whole = self.deepspeed.utils.safe_get_full_fp32_param(parameter)
        else:
            whole = self.deepspeed.utils.safe_get_full_optimizer_state(parameter, kind)
        return whole

    @torch.no_grad()
    def _set(self, parameter: Any, kind: str | None, value: Tensor) -> None:
        if self.stage == 0:
            self._get(parameter, kind).copy_(value)
        elif self.stage == 3:
            self._set_partition(parameter, kind, value)
        elif kind is not None:
            self.deepspeed.utils.safe_set_full_optimizer_state(parameter, value, kind)
        else:
            self.deepspeed.utils.safe_set_full_fp32_param(parameter, value)
            parameter.copy_(value)

    def _set_partition(self, parameter: Any, kind: str | None, value: Tensor) -> None:
        """Write this rank's part of a ZeRO-3 tensor. DeepSpeed's own setter fails where the last part is padded."""
        utils = self.deepspeed.utils
        size = utils.safe_get_local_fp32_param(parameter).numel()
        part = value.flatten()[size * self.module.global_rank :][:size]
        part = nn.functional.pad(part, (0, size - part.numel()))
        if kind is None:
            utils.safe_set_local_fp32_param(parameter, part)
            parameter.ds_tensor.copy_(part)
            if parameter.shape == value.shape:  # small weights stay gathered
                parameter.copy_(value)
        else:
            utils.safe_set_local_optimizer_state(parameter, part, kind)


def _import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed quietly, for this device, on the process group that is there already."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It calls functions of torch under their old names, at every step.
    warnings.filterwarnings("ignore", r"`torch.distributed.\w+` is deprecated", FutureWarning)
    import deepspeed

    # Its shared-memory collectives for the CPU are compiled for minutes at first use, and a build that is killed leaves
    # a lock that hangs every later one. gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    return deepspeed
