"""Norm, rope and gated unit: the sides and shapes of `enc bench kernels norms | rope | swiglu`."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from enc.kernels import norms, rope

Shape = dict[str, Any]
SHAPES: dict[str, dict[str, Shape]] = {
    "norms": {"small": {"tokens": 4096, "hidden": 384}, "768": {"tokens": 65536, "hidden": 768}},
    "rope": {
        "small": {"tokens": 4096, "heads": 12, "head_dim": 32},
        "12x64": {"tokens": 65536, "heads": 12, "head_dim": 64},
    },
}


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return norms.rms_norm(x, weight, 1e-6)


def _torch_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, 1e-6)


def _torch_rope(x: Tensor, turns: Tensor) -> Tensor:
    return rope.reference(x, turns[:, None])


SIDES: dict[str, dict[str, Callable[..., Tensor]]] = {
    "norms": {"enc": _norm, "torch": _torch_norm},
    "rope": {"enc": rope.rope, "torch": _torch_rope},
}


def bytes(op: str, shape: Shape) -> int:
    """Return the bytes of forward (input, output) and backward (input, two gradients) in bf16."""
    width = shape["hidden"] if op == "norms" else shape["heads"] * shape["head_dim"]
    return 2 * 5 * shape["tokens"] * width
