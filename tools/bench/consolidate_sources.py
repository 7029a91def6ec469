"""Sources for `enc.tools.bench.consolidate`: an encoder's tensors as DeepSpeed ZeRO-3 and as DCP write them."""

import math
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_saver

from enc.encoder.optim.state_spec import ADAM

Shapes = dict[str, tuple[int, ...]]


def encoder_shapes(num_parameters: float) -> Shapes:
    """Return the shapes of an encoder of about so many parameters, blocks as wide as its size suggests."""
    width, rows = (2048, 32_003) if num_parameters > 1e8 else (64, 1_003)  # an odd number, so that ZeRO-3 pads
    ffn = width * 8 // 3 + 1
    block: Shapes = {"qkv.weight": (3 * width, width), "wo.weight": (width, width), "ffn.w1.weight": (ffn, width),
                     "ffn.w2.weight": (ffn, width), "ffn.w3.weight": (width, ffn), "norm.weight": (width,)}  # fmt: skip
    in_block = sum(math.prod(shape) for shape in block.values())
    num_blocks = max(1, math.ceil((num_parameters - rows * width) / in_block))
    shapes: Shapes = {"model.encoder.weight": (rows, width)}
    for number in range(num_blocks):
        shapes.update({f"model.transformer_encoder.{number}.{name}": shape for name, shape in block.items()})
    return shapes


def write_zero3(folder: Path, shapes: Shapes, tensors: Iterable[tuple[str, Tensor]], num_ranks: int) -> None:
    """Write the files of a ZeRO-3 save of DeepSpeed 0.19: each rank has ceil(n / ranks) elements of every tensor."""
    states = folder / "global_step1"
    states.mkdir(parents=True)
    share = {name: -(-math.prod(shape) // num_ranks) for name, shape in shapes.items()}
    vectors = [torch.zeros(sum(share.values())) for _ in range(num_ranks)]
    done = 0
    for name, tensor in tensors:
        for vector, part in zip(vectors, tensor.reshape(-1).split(share[name]), strict=False):
            vector[done : done + len(part)] = part
        done += share[name]
    for rank, vector in enumerate(vectors):
        moments = {"step": torch.tensor(1.0), **_moments(vector)}
        state = {
            "zero_stage": 3, "partition_count": num_ranks, "fp32_flat_groups": [vector],
            "optimizer_state_dict": {"state": {0: moments}, "param_groups": [{"params": [0]}]},
        }  # fmt: skip
        file = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": state, "ds_config": {}, "ds_version": "0.19.8"}, states / file)
        torch.save(_model_states(shapes, num_ranks), states / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    (folder / "latest").write_text(states.name)


def _moments(tensor: Tensor) -> dict[str, Tensor]:
    return dict(zip(ADAM.kinds, (tensor * 0.1, tensor * tensor), strict=True))


def _model_states(shapes: Shapes, num_ranks: int) -> dict[str, Any]:
    return {
        "module": {}, "buffer_names": [], "shared_params": {}, "frozen_param_shapes": None,
        "frozen_param_fragments": None, "param_shapes": [{name: torch.Size(shape) for name, shape in shapes.items()}],
        "global_steps": 1, "dp_world_size": num_ranks, "mp_world_size": 1, "ds_version": "0.19.8",
    }  # fmt: skip


def write_dcp(folder: Path, shapes: Shapes, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write a DCP folder with the names that get_state_dict gives."""
    model = dict(tensors)
    state = {name: _moments(tensor) for name, tensor in model.items()}
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        state_dict_saver.save({"model": model, "optim": {"state": state}}, checkpoint_id=folder, no_dist=True)
