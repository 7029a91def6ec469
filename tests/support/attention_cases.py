"""Inputs of ``varlen_attention`` with any of its features, shared by the tests of its paths."""

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from enc.kernels.attention_rules import RelativeBias
from enc.kernels.varlen_attention import reference

BUCKETS = {None: None, "small": (8, 16), "mpnet": (32, 128)}


@dataclass
class Case:
    """Leaves that get a gradient, and the options of a call."""

    q: Tensor
    k: Tensor
    v: Tensor
    table: Tensor | None
    cu_seqlens: Tensor
    options: dict[str, Any] = field(default_factory=dict)
    max_distance: int = 0

    def run(self, function, **more) -> dict[str, Tensor]:
        """Return the output and the gradients of a weighted sum of it."""
        bias = None if self.table is None else RelativeBias(self.table, self.max_distance)
        out = function(self.q, self.k, self.v, self.cu_seqlens, **self.options, bias=bias, **more)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        leaves = {"q": self.q, "k": self.k, "v": self.v} | ({} if self.table is None else {"table": self.table})
        grads = torch.autograd.grad(out, list(leaves.values()), weights.to(out.dtype).to(out.device))
        return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}

    def to(self, dtype: torch.dtype, device: str = "cpu") -> "Case":
        """Return the same case with q, k and v of another dtype; the table stays fp32, or is fp64 as well."""

        def leaf(x: Tensor, dtype: torch.dtype) -> Tensor:
            return x.detach().to(device, dtype).requires_grad_()

        moved = {
            name: x if not isinstance(x, tuple | Tensor) else
            x.to(device) if isinstance(x, Tensor) else tuple(part.to(device) for part in x)
            for name, x in self.options.items()
        }  # fmt: skip
        table = None if self.table is None else leaf(self.table, torch.promote_types(dtype, torch.float32))
        inputs = (leaf(x, dtype) for x in (self.q, self.k, self.v))
        return Case(*inputs, table, self.cu_seqlens.to(device), moved, self.max_distance)

    def errors(self, exact: dict[str, Tensor], function=reference, **more) -> dict[str, tuple[float, float]]:
        """Return the distance from the exact results, and their size, by name."""
        found = self.run(function, **more)
        return {
            name: (float((found[name].cpu().double() - true.cpu().double()).norm()), float(true.double().norm()))
            for name, true in exact.items()
        }


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def make_case(
    lengths: list[int],
    queries: list[int] | None = None,
    *,
    heads: int = 2,
    dim: int = 8,
    buckets: tuple[int, int] | None = None,
    window: int | None = None,
    stages: bool = False,
    positions: bool = False,
    scale: float | None = None,
    size: float = 1.0,
    seed: int = 0,
) -> Case:
    """Draw a case in fp64; ``queries`` are the documents' numbers of queries, if not those of keys."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).mul_(size)

    def integers(low: int, high: int, count: int) -> Tensor:
        return torch.randint(low, high, (count,), generator=generator).int()

    per_document = lengths if queries is None else queries
    num_keys, num_queries = sum(lengths), sum(per_document)
    q = draw(num_queries, heads, dim).requires_grad_()
    k, v = (x.requires_grad_() for x in draw(num_keys, heads, 2, dim).unbind(2))
    options: dict[str, Any] = {"scale": scale}
    if queries is not None:
        options["cu_seqlens_q"] = bounds(queries)
    if window is not None:
        options["window"] = window
    if positions or (queries is not None and (window is not None or buckets)):
        longest = max([*lengths, *per_document, 1])
        options["positions"] = integers(0, 2 * longest, num_queries), integers(0, 2 * longest, num_keys)
    if stages:
        options["stages"] = integers(0, 5, num_queries), integers(-4, 5, num_keys)
    table = None if buckets is None else draw(buckets[0], heads).requires_grad_()
    return Case(q, k.detach().requires_grad_(), v.detach().requires_grad_(), table, bounds(lengths), options,
                0 if buckets is None else buckets[1])  # fmt: skip


@st.composite
def cases(draw, max_documents: int = 5, max_length: int = 40, dims: tuple[int, ...] = (1, 7, 16)) -> Case:
    """Any combination of features, empty documents and other numbers of queries than keys included."""
    documents = draw(st.integers(0, max_documents))
    numbers = st.lists(st.integers(0, max_length), min_size=documents, max_size=documents)
    return make_case(
        draw(numbers),
        draw(st.none() | numbers),
        heads=draw(st.integers(1, 3)),
        dim=draw(st.sampled_from(dims)),
        buckets=BUCKETS[draw(st.sampled_from(list(BUCKETS)))],
        window=draw(st.none() | st.integers(0, max_length)),
        stages=draw(st.booleans()),
        positions=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 0.3])),
        seed=draw(st.integers(0, 9)),
    )


def two_streams(tokens: int, predicted: int, seed: int = 0) -> tuple[dict[str, Any], Tensor, int, int]:
    """Return MPNet's options for one document, its mask (True = seen), and the numbers of queries and keys.

    Keys: tokens that are not predicted, predicted ones, their placeholders. Queries: the same rows as the content
    stream, then the query stream. The mask is written down by blocks, as the paper's figure 2 draws it.
    """
    known, p = tokens - predicted, predicted
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed)).int()
    key_positions = torch.cat([order, order[known:]])
    j = torch.arange(1, p + 1, dtype=torch.int32)
    zeros = torch.zeros(known, dtype=torch.int32)
    key_stages = torch.cat([zeros, j, -j])
    query_stages = torch.cat([zeros, j, torch.zeros_like(j), j - 1])
    query_positions = torch.cat([key_positions, order[known:]])

    ones, up, low = torch.ones(p, p), torch.ones(p, p).triu(), torch.ones(p, p).tril(-1)  # 1 = hidden
    plain = torch.cat([torch.zeros(known, known), torch.ones(known, p), torch.zeros(known, p)], 1)
    real = torch.cat([torch.zeros(p, known), torch.ones(p, p).triu(1), ones.tril()], 1)
    placeholder = torch.cat([torch.zeros(p, known), ones, torch.zeros(p, p)], 1)
    query = torch.cat([torch.zeros(p, known), up, low], 1)
    visible = torch.cat([plain, real, placeholder, query]) == 0
    options = {"stages": (query_stages, key_stages), "positions": (query_positions, key_positions),
               "cu_seqlens_q": bounds([tokens + 2 * p])}  # fmt: skip
    return options, visible, tokens + 2 * p, tokens + p
