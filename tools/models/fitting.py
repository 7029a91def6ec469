"""Tensors of another program brought to the shapes of a model here.

The vocabulary may have another number of rows: here it is a multiple of 128, and rows beyond the tokenizer are inert.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from enc.encoder.checkpoints.tensor_file import TensorSpec
from enc.encoder.errors import UsageError
from enc.encoder.models.config import ModelConfig
from enc.encoder.optim.state_spec import StateSpec, split_kind
from enc.encoder.printable import shown
from enc.tools.readers.source import Stored

Shapes = dict[str, tuple[int, ...]]
T = TypeVar("T")


@dataclass(frozen=True)
class Derived:
    """A tensor that is computed from a stored one when it is asked for, in fp32."""

    shape: tuple[int, ...]
    compute: Callable[[], Tensor]

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(torch.float32, self.shape)

    def read(self) -> Tensor:
        """Return the tensor, on the CPU and contiguous."""
        return self.compute().float().contiguous()


@dataclass(frozen=True)
class ModelState:
    """A source's tensors as this package names them; `moments` is empty when the source has none that are of use."""

    model: ModelConfig
    weights: dict[str, Stored]
    moments: dict[str, Stored]


@dataclass(frozen=True)
class Fit:
    """Where tensors must fit: `unused` tells whether the vocabulary's rows from one on were never trained."""

    shapes: Shapes
    vocabulary: tuple[str, ...]
    unused: Callable[[int], bool]
    path: Path

    def fitted(self, tensors: dict[str, Stored]) -> dict[str, Stored]:
        """Return the tensors in their shapes; vocabulary rows are added as zeros, or dropped when never trained."""
        refuse_misfits(tensors, self.shapes, self.vocabulary, self.path)
        return {name: self._resized(tensors[name], shape) for name, shape in self.shapes.items()}

    def fitted_moments(self, moments: dict[str, Stored], spec: StateSpec) -> dict[str, Stored]:
        """Return the moments that an optimizer keeps, in their shapes; none when those of the source are others."""
        found, shapes = by_kind(moments), by_kind(spec.kept(self.shapes))
        if not shapes.keys() <= found.keys():
            return {}
        fitted = {kind: replace(self, shapes=shapes[kind]).fitted(found[kind]) for kind in shapes}
        return {f"{kind}.{name}": tensor for kind, of_kind in fitted.items() for name, tensor in of_kind.items()}

    def _resized(self, tensor: Stored, shape: tuple[int, ...]) -> Stored:
        rows, wanted = (tensor.spec.shape or (1,))[0], (shape or (1,))[0]
        if rows > wanted and not self.unused(wanted):
            raise UsageError(
                f"{self.path} has {rows} vocabulary rows, its tokenizer needs {wanted}, and the rest were trained. "
                "Give the tokenizer that it was trained with: --tokenizer DIR."
            )

        def compute() -> Tensor:
            whole = torch.zeros(shape)
            whole[: min(rows, wanted)] = tensor.read()[:wanted]
            return whole

        return Derived(shape, tensor.read if rows == wanted else compute)


def by_kind(moments: dict[str, T]) -> dict[str, dict[str, T]]:
    """Sort what is named `<kind>.<parameter>` into {kind: {parameter: it}}."""
    found: dict[str, dict[str, T]] = {}
    for name, moment in moments.items():
        kind, parameter = split_kind(name)
        found.setdefault(kind, {})[parameter] = moment
    return found


def unused_rows(weights: dict[str, Stored], moments: dict[str, Stored], embedding: str) -> Callable[[int], bool]:
    """Return a test whether the embedding's rows from one on were never trained: no gradient, or, unknown, all zero."""

    def unused(first: int) -> bool:
        evidence = [of_kind[embedding] for of_kind in by_kind(moments).values() if embedding in of_kind]
        return not any(tensor.read()[first:].any() for tensor in evidence or [weights[embedding]])

    return unused


def refuse_misfits(tensors: dict[str, Stored], shapes: Shapes, vocabulary: tuple[str, ...], path: Path) -> None:
    """Raise UsageError unless the tensors are those of the shapes, the vocabulary's number of rows left open."""
    missing, unknown = [n for n in shapes if n not in tensors], [n for n in tensors if n not in shapes]
    other = [
        f"{name} {tuple(tensors[name].spec.shape)} (the model has {shape})"
        for name, shape in shapes.items()
        if name in tensors and not _can_fit(tuple(tensors[name].spec.shape), shape, name in vocabulary)
    ]
    parts = [("missing", missing), ("unknown", unknown), ("of another shape", other)]
    if any(names for _, names in parts):
        listed = "; ".join(f"{what}: {', '.join(shown(n) for n in names[:4])}" for what, names in parts if names)
        raise UsageError(
            f"{path} does not fit the model section of the config. Tensors {listed}. Give --config or keys."
        )


def _can_fit(found: tuple[int, ...], wanted: tuple[int, ...], any_rows: bool) -> bool:
    return found == wanted or (any_rows and found[1:] == wanted[1:])
