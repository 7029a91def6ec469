"""``varlen_attention`` on CUDA with every rule, in Triton: online softmax forward, two kernels backward.

A program computes BLOCK queries (or keys) of one document and head, and walks over that document's keys (or queries).
Block t belongs to the document n with ``f(n) <= t < f(n + 1)``, ``f(n) = cu_seqlens[n] // BLOCK + n``: there is room
for all its blocks, since ``f(n + 1) - f(n) >= ceil(len_n / BLOCK)``. So a program finds its document by bisection of
cu_seqlens, no map is built and the host need not know a length. At most one block a document is without work.

Scores and their logsumexp are kept in base 2. With dS = P * (dO V^T * M - delta), delta = rowsum(dO * O):

    forward    O, lse, and each block's largest score
    dq         delta, dQ = scale * dS K, and dS summed by bucket
    dk, dv     dV = (P * M)^T dO, dK = scale * dS^T Q

Everything is deterministic: nothing is added atomically, what programs share is written apart and summed in order. The
bias costs a gather a score from a table over distances. Its gradient costs a comparison and an addition for each score
and each bucket between the least and the greatest of a tile. Those are few where neighbouring tokens have neighbouring
positions, so tokens should come in the order of the text: in a document of 256 tokens 14 of 32 on average, by count
about as many instructions as half the rest of that kernel. Dropout draws Philox numbers (7 rounds, four scores a draw)
by (seed, head, query, key), so all passes see the same mask whatever their blocks.

Shapes: Tq queries, T keys, H heads, D head dim, N documents.
"""

import math
import os
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from enc.kernels import dispatch
from enc.kernels.attention_rules import Rules, buckets_by_distance
from enc.kernels.tensors import unit_last_stride

_LOG2_E = math.log2(math.e)


class Blocks(NamedTuple):
    """How a kernel is cut: tokens that a program owns, tokens it takes at a time, and Triton's two numbers."""

    own: int
    walked: int
    num_warps: int
    num_stages: int


@triton.jit
def _document_of(CU, block, num_documents, BLOCK: tl.constexpr):
    """Return the document of a block."""
    low, high = 0, num_documents
    while high - low > 1:
        middle = (low + high) // 2
        is_before = tl.load(CU + middle) // BLOCK + middle <= block
        low, high = tl.where(is_before, middle, low), tl.where(is_before, high, middle)
    return low


@triton.jit
def _block(CU, CU_Q, CU_K, block, num_documents, BLOCK: tl.constexpr):
    """Return where a block of the tokens that CU bounds starts in its document, and the document's queries and keys.

    These are first query, number of queries, first key, number of keys.
    """
    document = _document_of(CU, block, num_documents, BLOCK)
    start = (block - tl.load(CU + document) // BLOCK - document) * BLOCK
    first_q, first_k = tl.load(CU_Q + document), tl.load(CU_K + document)
    return start, first_q, tl.load(CU_Q + document + 1) - first_q, first_k, tl.load(CU_K + document + 1) - first_k


@triton.jit
def _load(
    X, tokens, dims, token_stride, num_tokens, HEAD_DIM: tl.constexpr, D: tl.constexpr, INTERPRETED: tl.constexpr
):
    """Return tokens of a head, (tokens, D), zero outside. X points at the head in the first token of the document."""
    inside = tokens[:, None] < num_tokens
    if HEAD_DIM != D:
        inside = inside & (dims[None, :] < HEAD_DIM)
    x = tl.load(X + tokens[:, None] * token_stride + dims[None, :], mask=inside, other=0.0)
    return x.to(tl.float32) if INTERPRETED else x  # the interpreter cannot calculate in bf16


@triton.jit
def _store(X, x, tokens, dims, token_stride, num_tokens, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    inside = tokens[:, None] < num_tokens
    if HEAD_DIM != D:
        inside = inside & (dims[None, :] < HEAD_DIM)
    tl.store(X + tokens[:, None] * token_stride + dims[None, :], x.to(X.dtype.element_ty), mask=inside)


@triton.jit
def _positions(POSITIONS, first, tokens, num_tokens):
    """Return the positions of tokens of a document that starts at first; their index where there are none."""
    return tokens if POSITIONS is None else tl.load(POSITIONS + first + tokens, mask=tokens < num_tokens, other=0)


@triton.jit
def _place(distance, max_distance):
    """Return where a distance is in tables that go from -max_distance to max_distance."""
    return tl.minimum(tl.maximum(distance, -max_distance), max_distance) + max_distance


@triton.jit
def _ruled(scores, inside, distance, stage, key_stage, BIAS, window, max_distance):
    """Return scores (base 2) with their bias, -inf where the key is not seen. All arguments broadcast to scores."""
    if BIAS is not None:
        scores += tl.load(BIAS + _place(distance, max_distance))
    if window is not None:
        inside = inside & (tl.abs(distance) <= window)
    if stage is not None:
        inside = inside & ((key_stage == 0) | ((stage >= tl.abs(key_stage)) == (key_stage > 0)))
    return tl.where(inside, scores, float("-inf"))


@triton.jit
def _kept(SEED, head, queries, quads, threshold):
    """Return four int8 numbers a pair of query and four keys, 1 where a score is kept, by broadcasting."""
    nothing = queries * 0 + quads * 0
    a, b, c, d = tl.philox(tl.load(SEED), nothing + quads, nothing + queries, nothing + head, nothing, 7)
    a, b = (a >> 1).to(tl.int32) >= threshold, (b >> 1).to(tl.int32) >= threshold
    c, d = (c >> 1).to(tl.int32) >= threshold, (d >> 1).to(tl.int32) >= threshold
    return tl.join(tl.join(a.to(tl.int8), b.to(tl.int8)), tl.join(c.to(tl.int8), d.to(tl.int8)))


@triton.jit
def varlen_attention_forward(
    Q, K, V, OUT, LSE, PEAK, CU_Q, CU_K, QUERY_POSITIONS, KEY_POSITIONS, QUERY_STAGES, KEY_STAGES, BIAS, SEED,
    q_token, q_head, k_token, k_head, v_token, v_head, num_queries, num_heads, num_documents,
    scale, window, max_distance, threshold, keep_factor,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, OWN: tl.constexpr, WALKED: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0), tl.program_id(1)
    start, first_q, num_q, first_k, num_k = _block(CU_Q, CU_Q, CU_K, block, num_documents, OWN)
    if start >= num_q:
        return

    queries, dims = start + tl.arange(0, OWN), tl.arange(0, D)
    K += first_k.to(tl.int64) * k_token + head * k_head
    V += first_k.to(tl.int64) * v_token + head * v_head
    q = _load(
        Q + first_q.to(tl.int64) * q_token + head * q_head, queries, dims, q_token, num_q, HEAD_DIM, D, INTERPRETED
    )
    query_position = _positions(QUERY_POSITIONS, first_q, queries, num_q)[:, None]
    stage = None
    if QUERY_STAGES is not None:
        stage = tl.load(QUERY_STAGES + first_q + queries, mask=queries < num_q, other=0)[:, None]
    bias = None
    if BIAS is not None:
        bias = BIAS + head * (2 * max_distance + 1)

    peak = tl.full((OWN,), float("-inf"), tl.float32)
    total = tl.zeros((OWN,), tl.float32)
    out = tl.zeros((OWN, D), tl.float32)
    for at in range(0, num_k, WALKED):
        keys = at + tl.arange(0, WALKED)
        if SEED is not None:  # drawn before the products, which would wait for it
            quads = at // 4 + tl.arange(0, WALKED // 4)
            kept = _kept(SEED, head, (first_q + queries)[:, None], quads[None, :], threshold)
            kept = tl.reshape(kept, (OWN, WALKED)) != 0
        k = _load(K, keys, dims, k_token, num_k, HEAD_DIM, D, INTERPRETED)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        distance = _positions(KEY_POSITIONS, first_k, keys, num_k)[None, :] - query_position
        key_stage = None
        if KEY_STAGES is not None:
            key_stage = tl.load(KEY_STAGES + first_k + keys, mask=keys < num_k, other=0)[None, :]
        scores = _ruled(scores, keys[None, :] < num_k, distance, stage, key_stage, bias, window, max_distance)
        higher = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet
        p = tl.exp2(scores - base[:, None])
        fade = tl.exp2(peak - base)
        peak = higher
        total = total * fade + tl.sum(p, 1)
        if SEED is not None:
            p = tl.where(kept, p, 0.0)
        v = _load(V, keys, dims, v_token, num_k, HEAD_DIM, D, INTERPRETED)
        out = out * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)

    seen = total > 0
    out = out * (tl.where(seen, keep_factor, 0.0) / tl.where(seen, total, 1.0))[:, None]
    out_token = num_heads * HEAD_DIM
    _store(OUT + first_q.to(tl.int64) * out_token + head * HEAD_DIM, out, queries, dims, out_token, num_q, HEAD_DIM, D)
    lse = tl.where(seen, peak + tl.log2(tl.where(seen, total, 1.0)), float("-inf"))
    tl.store(LSE + head.to(tl.int64) * num_queries + first_q + queries, lse, mask=queries < num_q)
    if PEAK is not None:
        largest = tl.max(tl.where(queries < num_q, peak, float("-inf")), 0)
        tl.store(PEAK + head * tl.num_programs(0) + block, largest * 0.6931471805599453)  # ln 2


@triton.jit
def varlen_attention_dq(
    Q, K, V, OUT, GRAD, LSE, DELTA, DQ, SUMS, CU_Q, CU_K, QUERY_POSITIONS, KEY_POSITIONS, QUERY_STAGES, KEY_STAGES,
    BIAS, BUCKETS, SEED,
    q_token, q_head, k_token, k_head, v_token, v_head, grad_token, grad_head, num_queries, num_heads, num_documents,
    scale, window, max_distance, threshold, keep_factor,
    NUM_BUCKETS: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, OWN: tl.constexpr, WALKED: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0), tl.program_id(1)
    start, first_q, num_q, first_k, num_k = _block(CU_Q, CU_Q, CU_K, block, num_documents, OWN)
    if start >= num_q:
        return

    queries, dims = start + tl.arange(0, OWN), tl.arange(0, D)
    out_token, of_head = num_heads * HEAD_DIM, head.to(tl.int64) * num_queries + first_q
    from_q = first_q.to(tl.int64)
    K += first_k.to(tl.int64) * k_token + head * k_head
    V += first_k.to(tl.int64) * v_token + head * v_head
    q = _load(Q + from_q * q_token + head * q_head, queries, dims, q_token, num_q, HEAD_DIM, D, INTERPRETED)
    grad = _load(
        GRAD + from_q * grad_token + head * grad_head, queries, dims, grad_token, num_q, HEAD_DIM, D, INTERPRETED
    )
    out = _load(OUT + from_q * out_token + head * HEAD_DIM, queries, dims, out_token, num_q, HEAD_DIM, D, INTERPRETED)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(DELTA + of_head + queries, delta, mask=queries < num_q)
    lse = tl.load(LSE + of_head + queries, mask=queries < num_q, other=float("-inf"))
    lse = tl.where(lse == float("-inf"), 0.0, lse)[:, None]  # the query sees nothing, all its scores are -inf
    query_position = _positions(QUERY_POSITIONS, first_q, queries, num_q)[:, None]
    stage = None
    if QUERY_STAGES is not None:
        stage = tl.load(QUERY_STAGES + first_q + queries, mask=queries < num_q, other=0)[:, None]
    bias = None
    if BIAS is not None:
        bias = BIAS + head * (2 * max_distance + 1)

    dq = tl.zeros((OWN, D), tl.float32)
    sums = tl.zeros((NUM_BUCKETS,), tl.float32)
    for at in range(0, num_k, WALKED):
        keys = at + tl.arange(0, WALKED)
        if SEED is not None:  # drawn before the products, which would wait for it
            quads = at // 4 + tl.arange(0, WALKED // 4)
            kept = _kept(SEED, head, (first_q + queries)[:, None], quads[None, :], threshold)
            kept = tl.reshape(kept, (OWN, WALKED)) != 0
        k = _load(K, keys, dims, k_token, num_k, HEAD_DIM, D, INTERPRETED)
        v = _load(V, keys, dims, v_token, num_k, HEAD_DIM, D, INTERPRETED)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        distance = _positions(KEY_POSITIONS, first_k, keys, num_k)[None, :] - query_position
        key_stage = None
        if KEY_STAGES is not None:
            key_stage = tl.load(KEY_STAGES + first_k + keys, mask=keys < num_k, other=0)[None, :]
        inside = (queries[:, None] < num_q) & (keys[None, :] < num_k)
        scores = _ruled(scores, inside, distance, stage, key_stage, bias, window, max_distance)
        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        if SEED is not None:
            dp = tl.where(kept, dp * keep_factor, 0.0)
        ds = tl.exp2(scores - lse) * (dp - delta[:, None])
        dq += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
        if SUMS is not None:
            bucket = tl.load(BUCKETS + _place(distance, max_distance))
            least, most = tl.min(tl.where(inside, bucket, NUM_BUCKETS)), tl.max(tl.where(inside, bucket, -1))
            for b in range(least, most + 1):
                found = tl.sum(tl.where(bucket == b, ds, 0.0))
                sums += tl.where(tl.arange(0, NUM_BUCKETS) == b, found, 0.0)

    dq *= scale * 0.6931471805599453  # the scale is in base 2
    _store(DQ + from_q * out_token + head * HEAD_DIM, dq, queries, dims, out_token, num_q, HEAD_DIM, D)
    if SUMS is not None:
        tl.store(SUMS + (block * num_heads + head) * NUM_BUCKETS + tl.arange(0, NUM_BUCKETS), sums)


@triton.jit
def varlen_attention_dk_dv(
    Q, K, V, GRAD, LSE, DELTA, DK, DV, CU_Q, CU_K, QUERY_POSITIONS, KEY_POSITIONS, QUERY_STAGES, KEY_STAGES, BIAS, SEED,
    q_token, q_head, k_token, k_head, v_token, v_head, grad_token, grad_head, num_queries, num_heads, num_documents,
    scale, window, max_distance, threshold, keep_factor,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, OWN: tl.constexpr, WALKED: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    # Tiles are (keys, queries) here, so that no product needs a transposed left side.
    block, head = tl.program_id(0), tl.program_id(1)
    start, first_q, num_q, first_k, num_k = _block(CU_K, CU_Q, CU_K, block, num_documents, OWN)
    if start >= num_k:
        return

    keys, dims = start + tl.arange(0, OWN), tl.arange(0, D)
    from_q, from_k = first_q.to(tl.int64), first_k.to(tl.int64)
    Q += from_q * q_token + head * q_head
    GRAD += from_q * grad_token + head * grad_head
    LSE += head.to(tl.int64) * num_queries + first_q
    DELTA += head.to(tl.int64) * num_queries + first_q
    k = _load(K + from_k * k_token + head * k_head, keys, dims, k_token, num_k, HEAD_DIM, D, INTERPRETED)
    v = _load(V + from_k * v_token + head * v_head, keys, dims, v_token, num_k, HEAD_DIM, D, INTERPRETED)
    key_position = _positions(KEY_POSITIONS, first_k, keys, num_k)[:, None]
    key_stage = None
    if KEY_STAGES is not None:
        key_stage = tl.load(KEY_STAGES + first_k + keys, mask=keys < num_k, other=0)[:, None]
    bias = None
    if BIAS is not None:
        bias = BIAS + head * (2 * max_distance + 1)

    dk, dv = tl.zeros((OWN, D), tl.float32), tl.zeros((OWN, D), tl.float32)
    for at in range(0, num_q, WALKED):
        queries = at + tl.arange(0, WALKED)
        inside = (keys[:, None] < num_k) & (queries[None, :] < num_q)
        if SEED is not None:
            quads = start // 4 + tl.arange(0, OWN // 4)
            kept = _kept(SEED, head, (first_q + queries)[None, :], quads[:, None], threshold)
            kept = tl.reshape(tl.permute(kept, (0, 2, 3, 1)), (OWN, WALKED)) != 0
        q = _load(Q, queries, dims, q_token, num_q, HEAD_DIM, D, INTERPRETED)
        grad = _load(GRAD, queries, dims, grad_token, num_q, HEAD_DIM, D, INTERPRETED)
        lse = tl.load(LSE + queries, mask=queries < num_q, other=0.0)
        lse = tl.where(lse == float("-inf"), 0.0, lse)[None, :]
        delta = tl.load(DELTA + queries, mask=queries < num_q, other=0.0)[None, :]
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
        distance = key_position - _positions(QUERY_POSITIONS, first_q, queries, num_q)[None, :]
        stage = None
        if QUERY_STAGES is not None:
            stage = tl.load(QUERY_STAGES + first_q + queries, mask=queries < num_q, other=0)[None, :]
        p = tl.exp2(_ruled(scores, inside, distance, stage, key_stage, bias, window, max_distance) - lse)
        dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        weights = p
        if SEED is not None:
            weights, dp = tl.where(kept, p * keep_factor, 0.0), tl.where(kept, dp * keep_factor, 0.0)
        dv += tl.dot(weights.to(grad.dtype), grad, input_precision=PRECISION)
        ds = p * (dp - delta)
        dk += tl.dot(ds.to(q.dtype), q, input_precision=PRECISION)

    out_token = num_heads * HEAD_DIM
    dk *= scale * 0.6931471805599453
    _store(DK + from_k * out_token + head * HEAD_DIM, dk, keys, dims, out_token, num_k, HEAD_DIM, D)
    _store(DV + from_k * out_token + head * HEAD_DIM, dv, keys, dims, out_token, num_k, HEAD_DIM, D)


def forward(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, seed: Tensor | None, rules: Rules
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output (Tq, H, D), the logsumexp of the scores in base 2 (H, Tq), and the largest scores (H,)."""
    q, k, v = (unit_last_stride(x) for x in (q, k, v))
    num_queries, num_heads, _ = q.shape
    cut = blocks("forward", q, bias=table is not None, dropout=seed is not None)
    out = q.new_empty(q.shape)
    lse = q.new_empty((num_heads, num_queries), dtype=torch.float32)
    grid = _grid(num_queries, cut.own, rules, num_heads)
    peak = q.new_full((num_heads, max(1, grid[0])), -torch.inf, dtype=torch.float32) if rules.max_logits else None
    if num_queries and num_heads:
        varlen_attention_forward[grid](
            q, k, v, out, lse, peak, *_rules_of(rules), _bias_by_distance(table, rules), seed,
            *_strides(q, k, v), num_queries, num_heads, len(rules.cu_seqlens) - 1, *_numbers(table, seed, rules),
            **_constants(q, cut),
        )  # fmt: skip
    return out, lse, q.new_empty(0, dtype=torch.float32) if peak is None else peak.amax(1)


def backward(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, seed: Tensor | None,
    rules: Rules,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k, v and the table; the last is empty without a table."""
    grad, q, k, v = (unit_last_stride(x) for x in (grad, q, k, v))
    (num_queries, num_heads, _), num_keys = q.shape, len(k)
    dq, dk, dv, delta = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, lse))
    bias = _bias_by_distance(table, rules)
    shared = *_strides(q, k, v, grad), num_queries, num_heads, len(rules.cu_seqlens) - 1, *_numbers(table, seed, rules)
    cut = blocks("dq", q, bias=table is not None, dropout=seed is not None)
    grid = _grid(num_queries, cut.own, rules, num_heads)
    sums = buckets = None
    if table is not None:
        num_buckets = triton.next_power_of_2(len(table))
        sums = q.new_zeros((grid[0], num_heads, num_buckets), dtype=torch.float32)
        buckets = _buckets(len(table), rules.max_distance, q.device)
    if num_queries and num_heads:
        varlen_attention_dq[grid](
            q, k, v, out, grad, lse, delta, dq, sums, *_rules_of(rules), bias, buckets, seed, *shared,
            NUM_BUCKETS=1 if sums is None else sums.shape[-1], **_constants(q, cut),
        )  # fmt: skip
    if num_keys and num_heads:
        cut = blocks("dk_dv", q, bias=table is not None, dropout=seed is not None)
        varlen_attention_dk_dv[_grid(num_keys, cut.own, rules, num_heads)](
            q, k, v, grad, lse, delta, dk, dv, *_rules_of(rules), bias, seed, *shared, **_constants(q, cut)
        )
    if table is None or sums is None:
        return dq, dk, dv, q.new_empty(0, dtype=torch.float32)
    return dq, dk, dv, sums.sum(0)[:, : len(table)].T.to(table.dtype).contiguous()


def blocks(kernel: str, q: Tensor, *, bias: bool, dropout: bool) -> Blocks:
    """Return the cut of a kernel: the largest whose programs keep everything in registers on all dispatch.

    One stage where a bias is gathered or Philox numbers are drawn: in a pipeline the compiler lets the products wait.
    """
    capability = dispatch.capability(q.device)
    large_heads, small_chip, blackwell = q.shape[-1] > 64, capability < (9, 0), capability >= (10, 0)
    if q.dtype == torch.float32:  # each product is three, of operands in two parts
        return Blocks(16, 16 if blackwell and kernel == "dq" and bias and not dropout else 32, 4, 1)
    if large_heads and bias and dropout:
        return Blocks(32, 16 if small_chip and kernel == "forward" else 32, 4, 1)
    num_warps = 8 if large_heads or (bias and dropout) else 4
    if kernel != "forward":
        short = small_chip or bias or dropout or large_heads
        return Blocks(64, 32 if short else 64, num_warps, 1 if dropout or (blackwell and large_heads) else 2)
    short = bias if large_heads else small_chip and bias == dropout
    return Blocks(64, 32 if short else 64, num_warps, 1 if bias or dropout else 2)


@cache
def _buckets(num_buckets: int, max_distance: int, device: torch.device) -> Tensor:
    return buckets_by_distance(num_buckets, max_distance, device).int()


def _grid(num_tokens: int, block: int, rules: Rules, num_heads: int) -> tuple[int, int]:
    return num_tokens // block + len(rules.cu_seqlens) - 1, num_heads


def _rules_of(rules: Rules) -> tuple[Tensor | None, ...]:
    return *rules.bounds, rules.query_positions, rules.key_positions, rules.query_stages, rules.key_stages


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for x in tensors for stride in x.stride()[:2])


def _bias_by_distance(table: Tensor | None, rules: Rules) -> Tensor | None:
    """Return the bias of every distance, in base 2. (H, 2 * max_distance + 1) fp32"""
    if table is None:
        return None
    buckets = buckets_by_distance(len(table), rules.max_distance, table.device)
    return (table.detach().T.float() * _LOG2_E).index_select(1, buckets).contiguous()


def _numbers(table: Tensor | None, seed: Tensor | None, rules: Rules) -> tuple[float | int | None, ...]:
    """Return scale in base 2, window, max_distance, and dropout's threshold for 31 bits and factor."""
    dropout_p = 0.0 if seed is None else rules.dropout_p
    keep_factor = 1 / (1 - dropout_p) if dropout_p < 1 else 0.0
    return rules.scale * _LOG2_E, rules.window, rules.max_distance, min(int(dropout_p * 2**31), 2**31 - 1), keep_factor


def _constants(q: Tensor, cut: Blocks) -> dict[str, int | str | bool]:
    return {
        "HEAD_DIM": q.shape[-1],
        "D": max(16, triton.next_power_of_2(q.shape[-1])),
        "OWN": cut.own,
        "WALKED": cut.walked,
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32",  # as PyTorch's own kernels take fp32
        "INTERPRETED": os.environ.get("TRITON_INTERPRET") == "1",
        "num_warps": cut.num_warps,
        "num_stages": cut.num_stages,
    }
