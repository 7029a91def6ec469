"""Figures of a tensor, computed in blocks so that no second copy of it is needed."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = 2**22  # elements


@dataclass(frozen=True)
class Stats:
    """Norm of a tensor and the number of its values that are not finite."""

    norm: float
    non_finite: int


@dataclass(frozen=True)
class Difference:
    """How far two tensors of one shape are apart."""

    same_bits: bool
    max_abs: float  # of the places where both are finite
    relative: float  # the same, of the largest value of either
    unlike_non_finite: int  # places where one is not finite and the other is another value


def stats_of(tensor: Tensor) -> Stats:
    """Return norm and non-finite count, in double precision."""
    total, non_finite = 0.0, 0
    for (block,) in _blocks(tensor):
        values = _wide(block)
        total += values.abs().square().sum().item()
        non_finite += int((~values.isfinite()).sum())
    return Stats(total**0.5, non_finite)


def difference_of(a: Tensor, b: Tensor) -> Difference:
    """Compare two tensors of one shape, of any dtypes."""
    same_bits, largest, furthest, unlike = a.dtype == b.dtype, 0.0, 0.0, 0
    for one, other in _blocks(a, b):
        if same_bits and torch.equal(one.view(torch.uint8), other.view(torch.uint8)):
            largest = max(largest, _largest(_wide(one)))
            continue
        same_bits = False
        x, y = _wide(one), _wide(other)
        finite = x.isfinite() & y.isfinite()
        equal = (x == y) | (x.isnan() & y.isnan())
        unlike += int((~finite & ~equal).sum())
        largest = max(largest, _largest(x), _largest(y))
        furthest = max(furthest, _largest((x - y).where(finite, torch.zeros_like(x))))
    return Difference(same_bits, furthest, furthest / largest if largest else 0.0, unlike)


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.complex128) if values.is_complex() else values.double()


def _largest(values: Tensor) -> float:
    finite = values.abs().nan_to_num(0.0, 0.0, 0.0)
    return finite.max().item() if finite.numel() else 0.0


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    flat = [tensor.reshape(-1) for tensor in tensors]
    for start in range(0, flat[0].numel(), _BLOCK):
        yield tuple(tensor[start : start + _BLOCK] for tensor in flat)
