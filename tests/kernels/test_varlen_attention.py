"""Packed attention: exact, blind across documents, opaque to torch.compile."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from attention_cases import bounds, cases, make_case, two_streams
from hypothesis import given, settings
from hypothesis import strategies as st

from enc.kernels import dispatch
from enc.kernels import varlen_attention as module
from enc.kernels.attention_rules import RelativeBias, relative_buckets
from enc.kernels.varlen_attention import (
    backend,
    reference,
    reference_scores,
    varlen_attention,
    why_not,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def packed(lengths: list[int], heads: int = 3, dim: int = 8, dtype=torch.float32, seed: int = 0):
    """Return a fused (T, H, 3, D) tensor, as a qkv projection makes it, and cu_seqlens."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(sum(lengths), heads, 3, dim, generator=generator, dtype=torch.float64).to(dtype)
    return qkv.requires_grad_(), bounds(lengths)


def run(function, qkv, cu_seqlens, grad, **options) -> tuple[torch.Tensor, torch.Tensor]:
    out = function(*qkv.unbind(2), cu_seqlens, **options)
    return out, torch.autograd.grad(out, qkv, grad.to(out.dtype))[0]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 70), max_size=6),
    heads=st.integers(1, 5),
    dim=st.sampled_from([1, 2, 7, 12, 32, 64, 123]),
    scale=st.sampled_from([None, 0.3, 4.0]),
)
def test_fp64_meets_the_reference(lengths, heads, dim, scale):
    """Output and gradient to fp64 accuracy, for empty documents, odd head sizes and no document at all."""
    qkv, cu_seqlens = packed(lengths, heads, dim, torch.float64)
    grad = torch.randn(len(qkv), heads, dim)
    ours, exact = (run(f, qkv, cu_seqlens, grad, scale=scale) for f in (varlen_attention, reference))
    torch.testing.assert_close(ours, exact, atol=1e-10, rtol=1e-10)


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_all_features_together_meet_the_reference(case):
    """Bias, stages, window, positions, other numbers of queries: output and every gradient to fp64 accuracy."""
    torch.testing.assert_close(case.run(varlen_attention), case.run(reference), atol=1e-10, rtol=1e-10)


@settings(max_examples=50, deadline=None)
@given(case=cases())
def test_the_largest_score_is_recorded(case):
    """The buffer is raised to the largest visible score of each head, and never lowered; the output stays."""
    bias = None if case.table is None else RelativeBias(case.table, case.max_distance)
    scores = reference_scores(case.q, case.k, case.cu_seqlens, **case.options, bias=bias)
    heads = case.q.shape[1]
    scores = torch.cat([scores.flatten(1), torch.full((heads, 1), -torch.inf)], 1)
    before = torch.tensor([-torch.inf, 100.0, 0.0])[:heads].clone()
    after = before.clone()
    result = case.run(varlen_attention, max_logits=after)
    torch.testing.assert_close(after, scores.amax(1).float().maximum(before))
    torch.testing.assert_close(result, case.run(reference), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 100.0])
def test_error_is_that_of_the_same_dtype_in_pytorch(dtype, size):
    """Against fp64, the error is at most that of SDPA a document under autograd in the same dtype, plus a little."""
    qkv, cu_seqlens = packed([123, 1, 507, 40], 4, 32, dtype)
    qkv = (qkv * size).detach().requires_grad_()
    grad = torch.randn(len(qkv), 4, 32)

    def plain(q, k, v, cu_seqlens):
        parts = [[part.transpose(0, 1)[None] for part in x.split(cu_seqlens.diff().tolist())] for x in (q, k, v)]
        outputs = [F.scaled_dot_product_attention(*document) for document in zip(*parts, strict=True)]
        return torch.cat([out[0].transpose(0, 1) for out in outputs])

    exact = run(reference, qkv.detach().double().requires_grad_(), cu_seqlens, grad)
    results = [run(f, qkv, cu_seqlens, grad) for f in (varlen_attention, plain)]
    for ours, theirs, true in zip(*results, exact, strict=True):
        assert (ours - true).norm() <= 1.05 * (theirs - true).norm() + 1e-7 * true.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 10.0])
def test_error_with_features_is_that_of_the_same_dtype_in_pytorch(dtype, size):
    """Against fp64, at most the error of a dense softmax under autograd, which is in fp32 here, plus a little."""
    case = make_case(
        [123, 1, 252], [123, 1, 507], heads=3, dim=32, buckets=(32, 128), stages=True, size=size
    ).to(dtype)  # fmt: skip
    exact = case.to(torch.float64).run(reference)
    ours, theirs = (case.errors(exact, f) for f in (varlen_attention, reference))
    for name, (error, norm) in ours.items():
        assert error <= 1.05 * theirs[name][0] + 4e-6 * norm, name


def test_no_document_sees_another():
    """Changing one document leaves the bits of all other outputs and gradients."""
    qkv, cu_seqlens = packed([20, 33, 7])
    changed = qkv.detach().clone()
    changed[20:53] = torch.randn(33, 3, 3, 8)
    grad = torch.randn(60, 3, 8)
    for options in ({}, {"window": 5}, {"bias": RelativeBias(torch.randn(8, 3), 16)}):
        before, after = (run(varlen_attention, x, cu_seqlens, grad, **options) for x in (qkv, changed.requires_grad_()))
        for a, b in zip(before, after, strict=True):
            assert torch.equal(a[:20], b[:20])
            assert torch.equal(a[53:], b[53:])
            assert not torch.equal(a[20:53], b[20:53])


@pytest.mark.parametrize(("tokens", "predicted"), [(4, 2), (20, 3), (9, 9), (7, 1)])
def test_stages_are_mpnets_two_streams(tokens, predicted):
    """The content and query streams see exactly what the paper's masks show; every row sees one key a token."""
    options, visible, num_queries, num_keys = two_streams(tokens, predicted)
    assert (visible.sum(1) == tokens).all()
    q, k, v = (torch.randn(n, 2, 8, dtype=torch.float64) for n in (num_queries, num_keys, num_keys))
    bias = RelativeBias(torch.randn(32, 2, dtype=torch.float64), 128)
    query_positions, key_positions = options["positions"]
    buckets = relative_buckets(key_positions[None] - query_positions[:, None], 32, 128)
    dense = bias.table[buckets].permute(2, 0, 1).masked_fill(~visible, -torch.inf)
    expected = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), attn_mask=dense)
    for function in (varlen_attention, reference):
        out = function(q, k, v, bounds([num_keys]), bias=bias, **options)
        torch.testing.assert_close(out, expected.transpose(0, 1))


def test_a_target_is_unknown_until_its_stage():
    """Changing a predicted token changes the query stream's later rows only, not one bit of the others."""
    options, _, num_queries, num_keys = two_streams(12, 4)
    q, k, v = torch.randn(num_queries, 2, 8), torch.randn(num_keys, 2, 8), torch.randn(num_keys, 2, 8)
    before = varlen_attention(q, k, v, bounds([num_keys]), **options)[-4:]
    k[8 + 1], v[8 + 1] = torch.randn(2, 2, 8)  # the second predicted token
    changed = (varlen_attention(q, k, v, bounds([num_keys]), **options)[-4:] != before).flatten(1).any(1)
    assert changed.tolist() == [False, False, True, True]


def test_buckets_are_those_of_t5_and_mpnet():
    """By T5's formula written out for one distance, and the first distance of each bucket in MPNet."""

    def bucket(distance: int, num_buckets: int, max_distance: int) -> int:
        half, size = num_buckets // 2, abs(distance)
        exact, base = half // 2, half if distance > 0 else 0
        if size < exact:
            return base + size
        steps = math.log(size / exact) / math.log(max_distance / exact) * (half - exact)
        return base + min(half - 1, exact + int(steps))

    distances = torch.arange(-1100, 1101)
    for numbers in ((32, 128), (64, 256), (128, 512), (8, 16)):
        expected = [bucket(distance, *numbers) for distance in distances.tolist()]
        assert relative_buckets(distances, *numbers).tolist() == expected
        saturated = relative_buckets(distances.clamp(-numbers[1], numbers[1]), *numbers)
        assert saturated.tolist() == expected
    found = relative_buckets(torch.arange(0, -200, -1), 32, 128)
    starts = [int((found == b).int().argmax()) for b in range(16)]
    assert starts == [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]


def test_strided_and_contiguous_inputs_give_the_same_bits():
    """Views of a fused projection need no copy; an expanded gradient is accepted."""
    qkv, cu_seqlens = packed([20, 33, 7])
    for options in ({}, {"window": 5}):
        strided = varlen_attention(*qkv.unbind(2), cu_seqlens, **options)
        contiguous = (x.contiguous() for x in qkv.unbind(2))
        assert torch.equal(strided, varlen_attention(*contiguous, cu_seqlens, **options))
        (from_sum,) = torch.autograd.grad(strided.sum(), qkv, retain_graph=True)
        assert torch.equal(from_sum, torch.autograd.grad(strided, qkv, torch.ones_like(strided))[0])


def test_labelled_rows_alone_give_their_rows():
    """A last layer that computes some rows only gets their outputs, and the gradient of all keys."""
    qkv, cu_seqlens = packed([20, 33, 7], dtype=torch.float64)
    q, k, v = qkv.unbind(2)
    rows = torch.tensor([0, 5, 19, 30, 31, 58])
    some = varlen_attention(q[rows], k, v, cu_seqlens, cu_seqlens_q=bounds([3, 2, 1]))
    every = varlen_attention(q, k, v, cu_seqlens)[rows]
    torch.testing.assert_close(some, every)
    grads = (torch.autograd.grad(out.square().sum(), qkv, retain_graph=True)[0] for out in (some, every))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("features", [{}, {"window": 4, "buckets": (8, 16), "stages": True}])
def test_dropout_keeps_the_mean_and_follows_the_seed(features):
    """The mean over many draws is the output without dropout; one seed is one draw."""
    case = make_case([6, 11], heads=2, **features).to(torch.float32)
    no_dropout = case.run(varlen_attention)
    torch.manual_seed(0)
    draws = [case.run(varlen_attention, dropout_p=0.25) for _ in range(300)]
    for name in ("out", "v"):  # linear in the dropped weights
        values = torch.stack([draw[name] for draw in draws])
        assert ((values.mean(0) - no_dropout[name]).abs() <= 5 * values.std(0) / 300**0.5 + 1e-6).all()
    torch.manual_seed(0)
    torch.testing.assert_close(case.run(varlen_attention, dropout_p=0.25), draws[0], atol=0, rtol=0)
    assert not torch.equal(draws[0]["out"], draws[1]["out"])


def test_dropout_is_the_same_in_both_passes():
    """The gradient is that of the dropped weights, found by differences; each draws from the same seed."""
    case = make_case([5, 9], buckets=(8, 16), stages=True)

    def loss(*leaves):
        q, k, v, table = leaves
        torch.manual_seed(3)
        bias = RelativeBias(table, case.max_distance)
        return varlen_attention(q, k, v, case.cu_seqlens, 0.4, **case.options, bias=bias)

    assert torch.autograd.gradcheck(loss, (case.q, case.k, case.v, case.table))


def test_everything_dropped_is_zero():
    """A probability of one leaves zeros, not NaN."""
    qkv, cu_seqlens = packed([4, 5])
    for x in run(varlen_attention, qkv, cu_seqlens, torch.ones(9, 3, 8), dropout_p=1.0):
        assert (x == 0).all()


def test_long_documents_go_through_in_groups_of_heads(monkeypatch):
    """How many heads are computed at a time leaves output, gradients and the largest scores."""
    case, results = make_case([30, 9], heads=3, buckets=(8, 16)), []
    for scores in (1, 2000, 2**20):
        monkeypatch.setattr(module.per_document, "_SCORES", scores)
        max_logits = torch.full((3,), -torch.inf)
        results.append(case.run(varlen_attention, max_logits=max_logits) | {"max": max_logits})
    torch.testing.assert_close(results[0], results[2])
    torch.testing.assert_close(results[1], results[2])


@pytest.mark.parametrize("cu_seqlens", [[0, 5], [1, 10], [0, 7, 3, 10], [0, 12]])
def test_bad_boundaries_are_refused(cu_seqlens):
    """Every token belongs to exactly one document."""
    q = torch.randn(10, 2, 4)
    with pytest.raises(ValueError, match="rise from 0 to the number of tokens, 10"):
        varlen_attention(q, q, q, torch.tensor(cu_seqlens, dtype=torch.int32))


def test_missing_arguments_are_named():
    """Other numbers of queries need their bounds, and a window over them needs positions."""
    q, k = torch.randn(4, 2, 4), torch.randn(10, 2, 4)
    with pytest.raises(ValueError, match="pass cu_seqlens_q"):
        varlen_attention(q, k, k, bounds([10]))
    for options in ({"window": 3}, {"bias": RelativeBias(torch.zeros(8, 2), 16)}):
        with pytest.raises(ValueError, match="need the positions"):
            varlen_attention(q, k, k, bounds([10]), cu_seqlens_q=bounds([4]), **options)
    with pytest.raises(ValueError, match="at least 4"):
        relative_buckets(torch.arange(3), 3, 128)
    with pytest.raises(ValueError, match="greater than a quarter"):
        relative_buckets(torch.arange(3), 32, 8)


@pytest.mark.filterwarnings("ignore")  # opcheck's own
@pytest.mark.parametrize("features", [
    {}, {"buckets": (8, 16), "stages": True, "window": 4}, {"queries": [2, 12], "stages": True},
])  # fmt: skip
def test_the_op_obeys_pytorchs_rules(features):
    """Schema, fake kernel, autograd registration and AOT tracing, by PyTorch's own checker."""
    case = make_case([5, 9], **features)
    given = {"cu_seqlens_q": None, "positions": (None, None), "stages": (None, None), "window": None} | case.options
    tensors = case.q, case.k, case.v, case.table, None, case.cu_seqlens, given["cu_seqlens_q"]
    settings = 9, 0.3, 0.0, given["window"], case.max_distance, True
    arguments = *tensors, *given["positions"], *given["stages"], *settings
    torch.library.opcheck(torch.ops.enc.varlen_attention.default, arguments)


@pytest.mark.filterwarnings("ignore")  # torch's own, of dynamo's first import
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_the_op_does_not_break_graphs(dropout_p):
    """One graph with every feature, dropout included, which gives the numbers of eager mode."""
    case = make_case([5, 9], buckets=(8, 16), stages=True, window=4)
    compiled = torch.compile(varlen_attention, fullgraph=True, backend="aot_eager")
    results = []
    for function in (varlen_attention, compiled):
        torch.manual_seed(0)
        max_logits = torch.full((2,), -torch.inf)
        results.append(case.run(function, dropout_p=dropout_p, max_logits=max_logits) | {"max": max_logits})
    torch.testing.assert_close(*results)


def test_a_call_imports_no_compiler():
    """Attention with dropout starts without torch._dynamo, which takes a second to import."""
    code = (
        "import sys, torch; from enc.kernels.varlen_attention import varlen_attention as f\n"
        "q = torch.ones(3, 2, 4, requires_grad=True)\n"
        "f(q, q, q, torch.tensor([0, 3]), 0.1).sum().backward()\n"
        "sys.exit('torch._dynamo' in sys.modules or 'triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_why_not_is_a_sentence(monkeypatch):
    """It names the device or the missing package, and says what runs instead; a fused kernel needs no excuse."""
    assert "CPU" in why_not("cpu", torch.float32)
    assert "torch.float64" in why_not("cuda", torch.float64)
    assert "heads of 160" in why_not("cuda", torch.float32, 160)
    missing = {"flash_attn": "flash_attn is not installed", "triton": "triton is not installed"}
    monkeypatch.setattr(dispatch, "import_problem", missing.get)
    assert why_not("cuda", torch.bfloat16) is None
    assert "triton is not installed" in why_not("cuda", torch.bfloat16, bias=True)


def test_the_backend_follows_what_is_asked(monkeypatch):
    """Flash kernels where they serve, our own for every other feature, formulas where neither can."""
    monkeypatch.setattr(dispatch, "import_problem", {"flash_attn": "flash_attn is not installed"}.get)
    for dtype, head_dim, features, name in [
        (torch.bfloat16, 64, {}, "torch-flash"),
        (torch.float16, 256, {"window": True}, "torch-flash"),
        (torch.bfloat16, 64, {"dropout": True}, "triton"),
        (torch.bfloat16, 64, {"bias": True}, "triton"),
        (torch.bfloat16, 64, {"stages": True}, "triton"),
        (torch.bfloat16, 64, {"window": True, "positions": True}, "triton"),
        (torch.bfloat16, 64, {"positions": True}, "torch-flash"),
        (torch.bfloat16, 64, {"max_logits": True}, "triton"),
        (torch.bfloat16, 36, {}, "triton"),
        (torch.float32, 128, {}, "triton"),
        (torch.float32, 160, {}, "formulas"),
        (torch.float64, 64, {}, "formulas"),
    ]:
        assert backend("cuda", dtype, head_dim, **features) == name, (dtype, head_dim, features)
    assert backend("cpu", torch.float32) == "cpu-flash"
    assert backend("cpu", torch.float32, dropout=True) == "formulas"
    monkeypatch.setattr(dispatch, "import_problem", {}.get)
    assert backend("cuda", torch.bfloat16, 64) == "flash-attn"
    assert backend("cuda", torch.bfloat16, 64, stages=True) == "triton"
