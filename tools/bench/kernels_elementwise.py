"""Norms, rope and gate: the sides and shapes of `enc bench kernels norms | add_norms | rope | swiglu`.

What a side is called with: `norms` f(x, weight) -> y and `add_norms` f(x, branch, weight) -> (x + branch, y), RMSNorm
of (T, E); `rope` f(x, cos_sin) -> (T, H, D), adjacent pairs; `swiglu` f(a, b) -> silu(a) b, (T, F).
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from enc.kernels import norms, rope, swiglu

EPS = 1e-6
Shape = dict[str, Any]
SideOf = Callable[..., Tensor | tuple[Tensor, Tensor]]
_ROWS: dict[str, Shape] = {"small": {"tokens": 4096, "hidden": 384}, "768": {"tokens": 65536, "hidden": 768}}
SHAPES: dict[str, dict[str, Shape]] = {
    "norms": _ROWS,
    "add_norms": _ROWS,
    "rope": {
        "small": {"tokens": 4096, "heads": 12, "head_dim": 32},
        "12x64": {"tokens": 65536, "heads": 12, "head_dim": 64},
    },
    "swiglu": {"small": {"tokens": 4096, "hidden": 1024}, "2048": {"tokens": 65536, "hidden": 2048}},
}
# Tensors of tokens x width that are read or written, forward and backward; what a norm or gate reads again is counted.
_PASSES = {"norms": 2 + 3, "add_norms": 4 + 4, "rope": 2 + 2, "swiglu": 3 + 5}
FORWARD_SHARE = {"norms": 2 / 5, "add_norms": 4 / 8, "rope": 2 / 4, "swiglu": 3 / 8}


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return norms.rms_norm(x, weight, EPS)


def _torch_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, EPS)


def _liger_norm(x: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    y: Tensor = LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False)
    return y


def _add_norm(x: Tensor, branch: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return norms.add_rms_norm(x, branch, weight, EPS)


def _torch_add_norm(x: Tensor, branch: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + branch
    return total, _torch_norm(total, weight)


def _liger_add_norm(x: Tensor, branch: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    y, total = LigerFusedAddRMSNormFunction.apply(branch, x, weight, EPS, 0.0, "llama", False)
    return total, y


def _torch_rope(x: Tensor, cos_sin: Tensor) -> Tensor:
    return rope.reference(x, cos_sin[:, None])


def _liger_gate(a: Tensor, b: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    y: Tensor = LigerSiLUMulFunction.apply(a, b)
    return y


def _compiled(function: SideOf) -> SideOf:
    @cache
    def compiled() -> SideOf:
        return torch.compile(function)

    return lambda *inputs: compiled()(*inputs)


# Liger rotates the two halves of a head against each other, not adjacent pairs: it is no rival in rope.
SIDES: dict[str, dict[str, SideOf]] = {
    "norms": {"enc": _norm, "torch": _torch_norm, "compiled": _compiled(_torch_norm), "liger": _liger_norm},
    "add_norms": {
        "enc": _add_norm,
        "torch": _torch_add_norm,
        "compiled": _compiled(_torch_add_norm),
        "liger": _liger_add_norm,
    },
    "rope": {"enc": rope.rope, "torch": _torch_rope, "compiled": _compiled(_torch_rope)},
    "swiglu": {
        "enc": swiglu.swiglu,
        "torch": swiglu.reference,
        "compiled": _compiled(swiglu.reference),
        "liger": _liger_gate,
    },
}


def bytes(op: str, shape: Shape) -> int:
    """Return the bytes of forward and backward in bf16, nothing moved twice."""
    tokens: int = shape["tokens"]
    width: int = shape["heads"] * shape["head_dim"] if op == "rope" else shape["hidden"]
    return 2 * _PASSES[op] * tokens * width


def available(side: str, device: str | None = None) -> str | None:
    """Say why a side cannot run on a device, the GPU where there is one if None is given; None if it can."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if side != "liger":
        return None
    if device == "cpu":
        return "liger-kernel has no CPU path"
    return None if find_spec("liger_kernel") else "the package liger-kernel is not installed"
