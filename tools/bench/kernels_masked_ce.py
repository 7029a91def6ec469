"""Masked cross-entropy, head included: the sides and shapes of `enc bench kernels masked_ce`.

A side is `f(hidden, weight, bias, targets) -> loss`, the sum over labelled rows.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from enc.kernels import masked_ce
from enc.tools.bench.machine import installed_version

Shape = dict[str, Any]
SHAPES: dict[str, Shape] = {
    "small": {"tokens": 5120, "masked": 0.2, "hidden": 384, "vocab": 8192},
    "768x30592": {"tokens": 65536, "masked": 0.2, "hidden": 768, "vocab": 30592},
    "768x50368": {"tokens": 65536, "masked": 0.3, "hidden": 768, "vocab": 50368},
    "1024x50368": {"tokens": 65536, "masked": 0.3, "hidden": 1024, "vocab": 50368},
    "768x128256": {"tokens": 65536, "masked": 0.2, "hidden": 768, "vocab": 128256},
    "768x250048": {"tokens": 65536, "masked": 0.15, "hidden": 768, "vocab": 250048},
}


def _enc(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    return masked_ce.masked_ce(hidden, weight, bias, targets)[0]


def _torch(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), targets, reduction="sum")


def _compiled(*inputs: Any) -> Tensor:
    return _compiled_torch()(*inputs)


@cache
def _compiled_torch() -> Callable[..., Tensor]:  # on first use: it imports the compiler
    return torch.compile(_torch)


def _torch_narrow(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Leave the logits and the loss in the dtype of the inputs."""
    return F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="sum")


def _torch_chunked(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, targets, linear_bias=bias, reduction="sum", options=options)


def _liger(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss: Tensor = LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, targets, bias)
    return loss


def _cce(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, filter_eps: str | None = "auto"
) -> Tensor:
    """By default it leaves out small gradients, which its error shows."""
    from cut_cross_entropy import linear_cross_entropy

    more = {} if bias is None else {"bias": bias}  # the released version knows none
    loss: Tensor = linear_cross_entropy(hidden, weight, targets, reduction="sum", filter_eps=filter_eps, **more)
    return loss


def _cce_exact(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    return _cce(hidden, weight, bias, targets, filter_eps=None)


SIDES: dict[str, Callable[..., Tensor]] = {
    "enc": _enc,
    "torch": _torch,
    "compiled": _compiled,
    "torch-narrow": _torch_narrow,
    "torch-chunked": _torch_chunked,
    "liger": _liger,
    "cce": _cce,
    "cce-exact": _cce_exact,
}
_PACKAGES = {"liger": "liger-kernel", "cce": "cut-cross-entropy", "cce-exact": "cut-cross-entropy"}


def rows(shape: Shape) -> int:
    masked: float = shape["tokens"] * shape["masked"]
    return max(1, round(masked))


def flops(shape: Shape) -> int:
    """Return the operations of forward and backward."""
    hidden: int = shape["hidden"]
    vocab: int = shape["vocab"]
    return 6 * rows(shape) * hidden * vocab


def bytes(shape: Shape) -> int:
    """Return the bytes of forward (hidden, weight) and backward (both again, both gradients) in bf16."""
    hidden: int = shape["hidden"]
    vocab: int = shape["vocab"]
    return 2 * 3 * hidden * (rows(shape) + vocab)


def available(side: str, device: str) -> str | None:
    """Say why a side cannot run on a device, None if it can."""
    if side == "torch-chunked" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return "this torch has no linear_cross_entropy in chunks"
    package = _PACKAGES.get(side)
    if package is None:
        return None
    if installed_version(package) is None:
        return f"the package {package} is not installed"
    return None if device == "cuda" else f"{package} needs a GPU"
