"""``varlen_attention`` one document after the other: PyTorch's flash kernel on the CPU, and formulas for the rest.

The formulas serve every rule on every device. For one document and head, with a bias or -inf in B and the dropout
factor M (0, or 1 / (1 - dropout_p))::

    S = scale * Q K^T + B       P = softmax(S)              O  = (P * M) V
    dV = (P * M)^T dO           dS = P * (dO V^T * M - rowsum(P * M * dO V^T))
    dQ = scale * dS K           dK = scale * dS^T Q         dtable[b] = sum of dS where the bucket is b

Both passes compute S and P in fp32 (fp64 for fp64), in groups of heads that stay near the cache; P is computed again in
the backward pass, M drawn again from the same seed. Bias and mask are one lookup: hidden pairs have a bucket of their
own, whose bias is -inf. Of the time of a pass with a bias, its lookup and its gradient take about a tenth.

Measured on one shared core, forward + backward, MPNet's two streams over 10 documents of 53..411 tokens, 12 heads of 64
(fp32 / bf16): 150 / 149 ms, against 632 / 736 ms for SDPA on a padded batch with a dense bias that is made once for all
layers, 1005 / 1263 where each layer makes it; with dropout 0.1 in fp32 254 ms against 956 and 1336.
"""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from enc.kernels.attention_rules import Rules, buckets_by_distance
from enc.kernels.dropout import keep_mask, scale
from enc.kernels.tensors import at_least_fp32, unit_last_stride

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_SCORES = 2**20  # scores that are held at a time, about, times three


def flash(q: Tensor, k: Tensor, v: Tensor, rules: Rules) -> tuple[Tensor, Tensor]:
    """Return the output (Tq, H, D) and the logsumexp of the scores (H, Tq), fp32 or fp64."""
    q, k, v = (unit_last_stride(x) for x in (q, k, v))
    out, lse = q.new_zeros(q.shape), q.new_zeros(q.shape[1::-1], dtype=at_least_fp32(q.dtype))
    for queries, keys in _documents(rules, len(q), len(k)):
        o, logsumexp = _flash(_heads_first(q[queries]), *(_heads_first(x[keys]) for x in (k, v)), scale=rules.scale)
        out[queries] = o[0].transpose(0, 1)
        lse[:, queries] = logsumexp[0]
    return out, lse


def flash_backward(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, rules: Rules
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    # In fp32 also for bf16 inputs: the CPU's bf16 backward kernel is 1.3-5 times slower, worst for short documents.
    grads = q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    grad, q, k, v, out = (unit_last_stride(x) for x in (grad, q, k, v, out))
    for queries, keys in _documents(rules, len(q), len(k)):
        places = (queries, queries, keys, keys, queries)
        inputs = (_heads_first(x[place]).to(lse.dtype) for x, place in zip((grad, q, k, v, out), places, strict=True))
        parts = _flash_backward(*inputs, lse[None, :, queries], 0.0, False, scale=rules.scale)
        for target, part, place in zip(grads, parts, (queries, keys, keys), strict=True):
            target[place] = part[0].transpose(0, 1)
    return grads


def formulas(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, seed: Tensor | None, rules: Rules
) -> tuple[Tensor, Tensor]:
    """Return the output (Tq, H, D) and the largest score of each head (H,), the latter empty if not asked for."""
    out = q.new_zeros(q.shape)
    peak = torch.full((q.shape[1] if rules.max_logits else 0,), -torch.inf, device=q.device)
    generator = _generator(seed)
    for part in _parts(q, k, table, rules):
        scores = part.scores(q, k)
        if rules.max_logits:
            peak[part.heads] = peak[part.heads].maximum(scores.amax((1, 2)).float())
        p = part.softmax(scores)
        if generator:
            p.mul_(_dropout(p, rules.dropout_p, generator))
        part.write(out, torch.bmm(p, part.keys_of(v)), part.queries)
    return out, peak


def formulas_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, seed: Tensor | None, rules: Rules
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and the table; the last is empty without a table."""
    dq, dk, dv = q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    sums = _values(q, table).zero_()  # (H, num_codes)
    generator = _generator(seed)
    for part in _parts(q, k, table, rules):
        p = kept = part.softmax(part.scores(q, k))
        do = part.queries_of(grad)
        ds = torch.bmm(do, part.keys_of(v).transpose(1, 2))
        if generator:
            factor = _dropout(p, rules.dropout_p, generator)
            ds.mul_(factor)
            kept = factor.mul_(p)
        part.write(dv, torch.bmm(kept.transpose(1, 2), do), part.keys)
        ds = torch._softmax_backward_data(ds, p, -1, p.dtype)
        part.write(dq, torch.bmm(ds, part.keys_of(k)).mul_(rules.scale), part.queries)
        part.write(dk, torch.bmm(ds.transpose(1, 2), part.queries_of(q)).mul_(rules.scale), part.keys)
        if table is not None:
            assert part.codes is not None
            sums[part.heads].index_add_(1, part.codes.flatten(), ds.flatten(1))
    return dq, dk, dv, q.new_zeros(0) if table is None else sums[:, :-1].T.to(table.dtype).contiguous()


@dataclass
class _Part:
    """The scores of one document for a few heads, (h, nq, nk)."""

    queries: slice
    keys: slice
    heads: slice
    scale: float
    codes: Tensor | None  # (nq, nk): which column of values each pair takes; None: no bias, and all is seen
    values: Tensor  # (h or 1, num_codes)
    blind: Tensor | None  # (nq,) queries that see nothing, if there are any

    def queries_of(self, x: Tensor) -> Tensor:  # (h, nq, D)
        return x[self.queries, self.heads].transpose(0, 1).to(self.values.dtype)

    def keys_of(self, x: Tensor) -> Tensor:  # (h, nk, D)
        return x[self.keys, self.heads].transpose(0, 1).to(self.values.dtype)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        a, b = self.queries_of(q), self.keys_of(k).transpose(1, 2)
        if self.codes is None:
            return torch.bmm(a, b).mul_(self.scale)
        bias = self.values.index_select(1, self.codes.flatten()).view(-1, *self.codes.shape)
        return torch.baddbmm(bias, a, b, alpha=self.scale)

    def softmax(self, scores: Tensor) -> Tensor:
        p = scores.softmax(-1)
        return p if self.blind is None else p.masked_fill_(self.blind[:, None], 0)

    def write(self, target: Tensor, x: Tensor, tokens: slice) -> None:
        target[tokens, self.heads] = x.transpose(0, 1).to(target.dtype)


def _parts(q: Tensor, k: Tensor, table: Tensor | None, rules: Rules) -> Iterator[_Part]:
    values, num_heads = _values(q, table), q.shape[1]
    for queries, keys in _documents(rules, len(q), len(k)):
        codes = _codes(queries, keys, table, rules)
        blind = None if codes is None else (codes == values.shape[1] - 1).all(1)
        blind = blind if blind is not None and blind.any() else None
        pairs = (queries.stop - queries.start) * (keys.stop - keys.start)
        step = min(num_heads, max(1, _SCORES // pairs))
        for first in range(0, num_heads, step):
            heads = slice(first, min(first + step, num_heads))
            of_heads = values if table is None else values[heads]
            yield _Part(queries, keys, heads, rules.scale, codes, of_heads, blind)


def _values(q: Tensor, table: Tensor | None) -> Tensor:
    """Return what each code adds to a score: the buckets' bias, or 0; and -inf. (H or 1, num_codes)"""
    visible = (
        q.new_zeros((1, 1), dtype=at_least_fp32(q.dtype))
        if table is None
        else table.detach().T.to(at_least_fp32(q.dtype))
    )
    return torch.cat([visible, torch.full_like(visible[:, :1], -torch.inf)], dim=1)


def _codes(queries: slice, keys: slice, table: Tensor | None, rules: Rules) -> Tensor | None:
    """Return the bucket of each pair, 0 without a bias, and the number of buckets where the key is hidden. (nq, nk)"""
    codes, hidden = None, []
    if table is not None or rules.window is not None:
        key_positions = _positions(rules.key_positions, keys, rules)
        distance = key_positions[None, :] - _positions(rules.query_positions, queries, rules)[:, None]
        if table is not None:
            places = distance.clamp(-rules.max_distance, rules.max_distance).add_(rules.max_distance)
            buckets = buckets_by_distance(len(table), rules.max_distance, distance.device)
            codes = buckets.index_select(0, places.flatten()).view_as(places)
        if rules.window is not None:
            hidden.append(distance.abs() > rules.window)
    if rules.key_stages is not None and rules.query_stages is not None:
        stage, key_stage = rules.query_stages[queries, None], rules.key_stages[None, keys]
        hidden.append((key_stage != 0) & ((stage >= key_stage.abs()) != (key_stage > 0)))
    if not hidden:
        return codes
    if codes is None:
        return functools.reduce(torch.logical_or, hidden).long()
    assert table is not None
    return codes.masked_fill_(functools.reduce(torch.logical_or, hidden), len(table))


def _positions(positions: Tensor | None, tokens: slice, rules: Rules) -> Tensor:
    """Return the positions of a document's queries or keys; their index in it where there are none."""
    if positions is None:
        return torch.arange(tokens.stop - tokens.start, device=rules.cu_seqlens.device)
    return positions[tokens]


def _generator(seed: Tensor | None) -> torch.Generator | None:
    return None if seed is None else torch.Generator(seed.device).manual_seed(int(seed))


def _dropout(p: Tensor, dropout_p: float, generator: torch.Generator) -> Tensor:
    if p.device.type == "cpu":
        return keep_mask(p.shape, dropout_p, generator, p.dtype).mul_(scale(dropout_p))
    if dropout_p >= 1:
        return torch.zeros_like(p)
    return torch.empty_like(p).bernoulli_(1 - dropout_p, generator=generator).div_(1 - dropout_p)


def _documents(rules: Rules, num_queries: int, num_keys: int) -> Iterator[tuple[slice, slice]]:
    """Yield the queries and the keys of each document that has both."""
    keys = _slices(rules.cu_seqlens, num_keys, "cu_seqlens")
    queries = keys if rules.cu_seqlens_q is None else _slices(rules.cu_seqlens_q, num_queries, "cu_seqlens_q")
    for a, b in zip(queries, keys, strict=True):
        if a.start < a.stop and b.start < b.stop:
            yield a, b


def _slices(cu_seqlens: Tensor, num_tokens: int, name: str) -> list[slice]:
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != num_tokens or any(b < a for a, b in itertools.pairwise(bounds)):
        raise ValueError(
            f"{name} must rise from 0 to the number of tokens, {num_tokens}, but is {bounds}; "
            "give padding a document of its own"
        )
    return [slice(a, b) for a, b in itertools.pairwise(bounds)]


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).unsqueeze(0)  # (1, H, len, D)
