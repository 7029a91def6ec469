"""The operations that `enc bench kernels` measures: what their sides are called with, what it costs, the exact result.

The sides and shapes themselves are listed in `kernels_<operation>.py`.

Legend: T tokens, M labelled rows, H hidden size, V vocabulary rows, D head dim, N documents.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from enc.encoder.errors import UsageError
from enc.encoder.spelling import did_you_mean
from enc.kernels import masked_ce, rope, swiglu
from enc.kernels.attention_rules import relative_buckets
from enc.tools.bench import kernels_elementwise, kernels_masked_ce, kernels_varlen_attention

Shape = dict[str, Any]
SideOf = Callable[..., Tensor | tuple[Tensor, ...]]
_ROWS = 1024


@dataclass(frozen=True)
class Operation:
    """One operation that several sides compute, each a function of the same inputs."""

    sides: Mapping[str, SideOf]
    shapes: Mapping[str, Shape]  # the first one is small enough for a CPU
    inputs: Callable[[Shape, torch.dtype], list[Any]]  # on the CPU; tensors that want a gradient say so
    exact: SideOf  # the outputs from the same inputs in fp64
    flops: Callable[[Shape], float]  # of forward and backward, nothing computed twice
    bytes: Callable[[Shape], float]  # of forward and backward at two bytes a number, nothing moved twice
    forward_share: float  # of operations and bytes
    why_not: Callable[[str, str], str | None]  # (side, cpu or cuda)

    def default_shapes(self, device: str) -> list[Shape]:
        """Return the shapes of a device: the small one on a CPU, the others on a GPU."""
        shapes = list(self.shapes.values())
        return shapes[:1] if device == "cpu" else shapes[1:]

    def parse_shape(self, text: str) -> Shape:
        """Return the shape that `name` or `key=value,key=value` means; what is left out is that of the first shape.

        Raises UsageError for a name or key that is not known, or a value that is no number.
        """
        if text in self.shapes:
            return self.shapes[text]
        shape = dict(next(iter(self.shapes.values())))
        for part in text.split(","):
            key, _, value = part.partition("=")
            if key not in shape:
                hint = did_you_mean(key, [*self.shapes, *shape]) or "."
                keys = ", ".join(f"{key}={value}" for key, value in shape.items())
                raise UsageError(
                    f"--shape {text} is not known{hint} Name one of {', '.join(self.shapes)}, or set keys: {keys}."
                )
            try:
                shape[key] = type(shape[key])(value)
            except ValueError:
                raise UsageError(f"--shape {text}: {key} must be a number like {shape[key]}, not {value!r}.") from None
            least = 0 if key in ("buckets", "natural") else 1  # off
            if isinstance(shape[key], int) and shape[key] < least:
                raise UsageError(f"--shape {text}: {key} must be at least {least}.")
        return shape


def _normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


# --- masked cross-entropy --------------------------------------------------------------------------------------------


def _ce_inputs(shape: Shape, dtype: torch.dtype) -> list[Any]:
    rows, hidden, vocab = kernels_masked_ce.rows(shape), shape["hidden"], shape["vocab"]
    x = _normal(rows, hidden).to(dtype).requires_grad_()
    weight = _normal(vocab, hidden, seed=1, scale=hidden**-0.5).to(dtype).requires_grad_()
    targets = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(2))
    return [x, weight, None, targets]


def exact_ce(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Return the summed loss, in blocks of rows that are computed again in the backward pass."""

    def block(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight, bias), y, ignore_index=masked_ce.IGNORE_INDEX, reduction="sum")

    blocks = zip(hidden.split(_ROWS), targets.split(_ROWS), strict=True)
    return torch.stack([checkpoint(block, x, y, use_reentrant=False) for x, y in blocks]).sum()


# --- attention -------------------------------------------------------------------------------------------------------


def _attention_inputs(shape: Shape, dtype: torch.dtype) -> list[Any]:
    tokens, heads, lengths = shape["tokens"], shape["heads"], kernels_varlen_attention.lengths(shape)
    q, k, v = (_normal(tokens, heads, shape["head_dim"], seed=i).to(dtype).requires_grad_() for i in range(3))
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    table = _normal(shape["buckets"], heads, seed=3).requires_grad_() if shape["buckets"] else None
    return [q, k, v, bounds, max(lengths), table]


def exact_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, table: Tensor | None
) -> Tensor:
    """Return attention within each document from its definition, computed again in the backward pass."""

    def document(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        scores = torch.einsum("ihd,jhd->hij", a, b) / math.sqrt(a.shape[-1])
        if table is not None:
            places = torch.arange(len(a), device=a.device)
            distances = places[None, :] - places[:, None]
            buckets = relative_buckets(distances, len(table), kernels_varlen_attention.MAX_DISTANCE)
            scores = scores + table[buckets].permute(2, 0, 1)
        return torch.einsum("hij,jhd->ihd", scores.softmax(-1), c)

    bounds = itertools.pairwise(cu_seqlens.tolist())
    return torch.cat([checkpoint(document, q[a:b], k[a:b], v[a:b], use_reentrant=False) for a, b in bounds])


# --- norm, rope, gated unit ------------------------------------------------------------------------------------------


def _rows(shape: Shape, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return _normal(shape["tokens"], shape["hidden"], seed=seed).to(dtype).requires_grad_()


def _norm_weight(shape: Shape, dtype: torch.dtype) -> Tensor:
    return (1 + _normal(shape["hidden"], seed=1, scale=0.1)).to(dtype).requires_grad_()


def _norm_inputs(shape: Shape, dtype: torch.dtype) -> list[Any]:
    return [_rows(shape, dtype), _norm_weight(shape, dtype)]


def _exact_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + kernels_elementwise.EPS).rsqrt() * weight


def _add_norm_inputs(shape: Shape, dtype: torch.dtype) -> list[Any]:
    return [_rows(shape, dtype), _rows(shape, dtype, seed=2), _norm_weight(shape, dtype)]


def _exact_add_norm(x: Tensor, branch: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x + branch, _exact_norm(x + branch, weight)


def _gate_inputs(shape: Shape, dtype: torch.dtype) -> list[Any]:
    return [_rows(shape, dtype), _rows(shape, dtype, seed=1)]


def _rope_inputs(shape: Shape, dtype: torch.dtype) -> list[Any]:
    x = _normal(shape["tokens"], shape["heads"], shape["head_dim"]).to(dtype).requires_grad_()
    return [x, rope.rotary_cos_sin(torch.arange(shape["tokens"]), shape["head_dim"])]


def _exact_rope(x: Tensor, cos_sin: Tensor) -> Tensor:
    return rope.reference(x, cos_sin[:, None])


_ELEMENTWISE: dict[str, tuple[Callable[[Shape, torch.dtype], list[Any]], SideOf]] = {
    "norms": (_norm_inputs, _exact_norm),
    "add_norms": (_add_norm_inputs, _exact_add_norm),
    "rope": (_rope_inputs, _exact_rope),
    "swiglu": (_gate_inputs, swiglu.reference),
}


def _elementwise(name: str) -> Operation:
    inputs, exact = _ELEMENTWISE[name]
    return Operation(
        kernels_elementwise.SIDES[name], kernels_elementwise.SHAPES[name], inputs, exact, lambda _: 0,
        lambda shape: kernels_elementwise.bytes(name, shape), kernels_elementwise.FORWARD_SHARE[name],
        kernels_elementwise.available,
    )  # fmt: skip


OPERATIONS: dict[str, Operation] = {
    "masked_ce": Operation(
        kernels_masked_ce.SIDES, kernels_masked_ce.SHAPES, _ce_inputs, exact_ce, kernels_masked_ce.flops,
        kernels_masked_ce.bytes, 1 / 3, kernels_masked_ce.available,
    ),
    "varlen_attention": Operation(
        kernels_varlen_attention.SIDES, kernels_varlen_attention.SHAPES, _attention_inputs, exact_attention,
        kernels_varlen_attention.flops, kernels_varlen_attention.bytes, 1 / 3, kernels_varlen_attention.available,
    ),
    **{name: _elementwise(name) for name in kernels_elementwise.SIDES},
}  # fmt: skip
