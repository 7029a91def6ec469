"""The operations that `enc bench kernels` measures: their sides, shapes, inputs, cost and exact result.

Legend: T tokens, M labelled rows, H hidden size, V vocabulary rows, D head dim, N documents.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from enc.encoder.config_load import did_you_mean
from enc.encoder.errors import UsageError
from enc.kernels import masked_ce

Shape = dict[str, Any]
_ROWS = 1024


@dataclass(frozen=True)
class Operation:
    """One operation that several sides compute, each a function of the same inputs."""

    sides: Mapping[str, Callable[..., Tensor]]
    shapes: Mapping[str, Mapping[str, Shape]]  # device -> name -> shape
    inputs: Callable[[Shape], list[Any]]  # on the CPU; tensors that want a gradient say so
    cost: Callable[[Shape, int, bool], tuple[float, float]]  # (shape, bytes a number, with backward) -> FLOP, bytes
    exact: Callable[..., Tensor]
    why_not: Callable[[str, torch.device, torch.dtype], str | None]

    def default_shapes(self, device: str) -> list[Shape]:
        return list(self.shapes[device].values())

    def parse_shape(self, text: str) -> Shape:
        """Return the shape that `name` or `key=value,key=value` means; what is left out is that of the first shape."""
        named = {name: shape for shapes in self.shapes.values() for name, shape in shapes.items()}
        if text in named:
            return named[text]
        shape = dict(next(iter(named.values())))
        for part in text.split(","):
            key, _, value = part.partition("=")
            if key not in shape:
                hint = did_you_mean(key, [*named, *shape]) or "."
                raise UsageError(
                    f"--shape {text} is not known{hint} Name one of {', '.join(named)}, or set "
                    f"{', '.join(f'{key}={value}' for key, value in shape.items())}."
                )
            try:
                shape[key] = type(shape[key])(value)
            except ValueError:
                raise UsageError(f"--shape {text}: {key} must be a number like {shape[key]}, not {value!r}.") from None
        return shape


def _rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# --- masked cross-entropy --------------------------------------------------------------------------------------------


def _ce_inputs(shape: Shape) -> list[Any]:
    rng, rows = _rng(), max(1, round(shape["tokens"] * shape["masked"]))
    hidden = torch.randn(rows, shape["hidden"], generator=rng)
    weight = torch.randn(shape["vocab"], shape["hidden"], generator=rng) * shape["hidden"] ** -0.5
    targets = torch.randint(shape["vocab"], (rows,), generator=rng)
    return [hidden.requires_grad_(), weight.requires_grad_(), None, targets]


def _ce_cost(shape: Shape, itemsize: int, backward: bool) -> tuple[float, float]:
    rows, hidden, vocab = round(shape["tokens"] * shape["masked"]), shape["hidden"], shape["vocab"]
    passes = 3 if backward else 1
    return 2 * passes * rows * hidden * vocab, (2 if backward else 1) * itemsize * hidden * (rows + vocab)


def exact_ce(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Return the summed loss, in blocks of rows that are computed again in the backward pass."""

    def block(x: Tensor, y: Tensor) -> Tensor:
        return masked_ce.reference(x, weight, bias, y)[0]

    blocks = zip(hidden.split(_ROWS), targets.split(_ROWS), strict=True)
    return torch.stack([checkpoint(block, x, y, use_reentrant=False) for x, y in blocks]).sum()


def _torch_ce(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), targets, reduction="sum")


def _enc_ce(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    return masked_ce.masked_ce(hidden, weight, bias, targets)[0]


def _always(side: str, device: torch.device, dtype: torch.dtype) -> None:
    return None


OPERATIONS: dict[str, Operation] = {
    "masked_ce": Operation(
        {"enc": _enc_ce, "torch": _torch_ce},
        {"cpu": {"small": {"tokens": 5120, "masked": 0.2, "hidden": 384, "vocab": 8192}}},
        _ce_inputs, _ce_cost, exact_ce, _always,
    ),
}  # fmt: skip
