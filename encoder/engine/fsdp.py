"""FSDP2: weights, gradients and moments sharded over ranks, gathered block by block while they are used.

With several groups of ranks (hybrid sharding) each group holds a whole sharded model, and gradients are summed over the
groups as well: less traffic between nodes for more memory.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard

from enc.encoder.engine.torch_engine import TorchEngine
from enc.encoder.models.architecture import Parameter
from enc.encoder.optim.config import OptimizerConfig

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class FsdpEngine(TorchEngine):
    """Engine for models whose state does not fit on one device."""

    def __init__(
        self,
        objective: nn.Module,
        model: nn.Module,
        blocks: Iterable[nn.Module],
        known: Mapping[str, Parameter],
        optimizer: OptimizerConfig,
        clip: float | None,
        settings: dict[str, Any],
        device: torch.device,
    ) -> None:
        """Shard `objective`, which holds `model`, block by block; `settings` are those of `fsdp_settings`."""
        replicate, shard = settings["mesh"]["replicate"], settings["mesh"]["shard"]
        options: dict[str, Any] = {
            "mesh": _mesh(device, replicate, shard),
            # Activations keep their own dtype: the residual stream is fp32, autocast chooses for the matmuls.
            "mp_policy": MixedPrecisionPolicy(
                _DTYPES[settings["param_dtype"]], _DTYPES[settings["reduce_dtype"]], cast_forward_inputs=False
            ),
            "reshard_after_forward": settings["reshard_after_forward"],
        }
        if settings["cpu_offload"]:
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
        for block in blocks:
            fully_shard(block, **options)
        fully_shard(objective, **options)
        assert isinstance(objective, FSDPModule)
        super().__init__(model, known, optimizer, clip)
        self.module: Any = objective
        self.world_size = replicate * shard

    def forward(self, batch: Any, last: bool) -> Any:
        # Each microbatch's gradient is sharded at once; only the sum over groups waits for the last one.
        self.module.set_requires_all_reduce(last)
        return self.module(batch)

    def backward(self, loss: Tensor, last: bool) -> None:
        torch.autograd.backward(loss * self.world_size)  # FSDP averages over ranks; the losses are shares of one sum

    def warm_up(self, batch: Any) -> None:
        """Nothing: the first step is like all others."""


def _mesh(device: torch.device, replicate: int, shard: int) -> DeviceMesh:
    if replicate == 1:
        return init_device_mesh(device.type, (shard,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (replicate, shard), mesh_dim_names=("replicate", "shard"))
