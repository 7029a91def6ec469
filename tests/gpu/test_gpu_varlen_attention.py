"""Packed attention on a GPU: each backend at real sizes, against fp64 and SDPA."""

import pytest
import torch
import torch.nn.functional as F
from attention_cases import Case, bounds, make_case, two_streams

from enc.kernels import dispatch
from enc.kernels.attention_rules import RelativeBias
from enc.kernels.varlen_attention import backend, reference, reference_scores, varlen_attention

FEATURES = {
    "plain": {},
    "window": {"window": 100},
    "window by position": {"window": 100, "positions": True},
    "bias": {"buckets": (32, 128)},
    "stages": {"stages": True},
    "all": {"buckets": (32, 128), "stages": True, "window": 300, "positions": True},
}
LENGTHS = [507, 1, 0, 123, 252, 64, 1025]
QUERIES = [76, 1, 3, 0, 300, 64, 1025]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def sdpa(q, k, v, cu_seqlens, *, bias=None, scale=None, **options) -> torch.Tensor:
    """SDPA over all documents under a dense bias in the dtype of q."""
    scores = reference_scores(torch.zeros_like(q), k, cu_seqlens, bias=bias, **options).to(q.dtype)
    seen = (scores > -torch.inf).any(2)
    dense = torch.where(seen[..., None], scores, 0.0)
    out = F.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), attn_mask=dense[None], scale=scale
    )
    return torch.where(seen.T[..., None], out[0].transpose(0, 1), 0.0)


@pytest.mark.parametrize("queries", [None, QUERIES])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("dim", [64, 128, 48])
def test_the_error_is_that_of_the_same_dtype_in_pytorch(features, dtype, dim, queries):
    """Against fp64, output and gradients are at most as far off as SDPA's in the same dtype, plus a little."""
    case = make_case(LENGTHS, queries, heads=3, dim=dim, **FEATURES[features]).to(dtype, "cuda")
    exact = case.to(torch.float64, "cuda").run(reference)
    ours, theirs = case.errors(exact, varlen_attention, max_seqlen=1100), case.errors(exact, sdpa)
    for name, (error, norm) in ours.items():
        assert error <= 1.1 * theirs[name][0] + 3e-6 * norm, name


@pytest.mark.parametrize("features", FEATURES)
def test_formulas_agree_with_the_kernels(features, monkeypatch):
    """Without Triton and flash kernels the same numbers come out, one document after the other."""
    case = make_case(LENGTHS, heads=3, dim=64, **FEATURES[features]).to(torch.float32, "cuda")
    fast = case.run(varlen_attention)
    monkeypatch.setattr(dispatch.allowed, "triton", False)
    assert backend("cuda", torch.float32) == "formulas"
    torch.testing.assert_close(case.run(varlen_attention), fast, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.1}])
@pytest.mark.parametrize("features", FEATURES)
def test_two_runs_give_the_same_bits(features, options, dtype):
    """Output and every gradient, with dropout from one seed."""
    case = make_case([300] * 40, heads=6, dim=64, **FEATURES[features]).to(dtype, "cuda")
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for _ in range(2):
            torch.manual_seed(5)
            results.append(case.run(varlen_attention, max_seqlen=300, **options))
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(*results, atol=0, rtol=0)


@pytest.mark.parametrize("features", ["plain", "all"])
def test_no_document_sees_another(features):
    """Changing one document leaves the bits of all other outputs and gradients."""
    case = make_case([200, 333, 70], heads=2, dim=64, **FEATURES[features]).to(torch.bfloat16, "cuda")
    before = case.run(varlen_attention)
    for x in (case.q, case.k, case.v):
        x.data[200:533] = torch.randn_like(x[200:533])
    after = case.run(varlen_attention)
    for name in ("out", "q", "k", "v"):
        assert torch.equal(before[name][:200], after[name][:200])
        assert torch.equal(before[name][533:], after[name][533:])
        assert not torch.equal(before[name][200:533], after[name][200:533])


def test_mpnets_two_streams():
    """The masks of the paper for 512 tokens of which 77 are predicted."""
    options, visible, num_queries, num_keys = two_streams(512, 77)
    q, k, v = (torch.randn(n, 12, 64) for n in (num_queries, num_keys, num_keys))
    case = Case(q, k, v, torch.randn(32, 12), bounds([num_keys]), options | {"scale": None}, 128)
    scores = reference_scores(q, k, bounds([num_keys]), bias=RelativeBias(case.table, 128),
                              positions=options["positions"], cu_seqlens_q=options["cu_seqlens_q"])  # fmt: skip
    expected = torch.einsum("hij,jhd->ihd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)
    out = case.to(torch.float32, "cuda").run(varlen_attention)["out"]
    torch.testing.assert_close(out.cpu(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("features", ["plain", "all"])
def test_dropout_keeps_the_mean_and_is_one_mask_in_both_passes(features):
    """The mean of many draws is the output without; the gradient of v is linear in the same mask as the output."""
    case = make_case([96, 40], heads=2, dim=64, **FEATURES[features]).to(torch.float32, "cuda")
    plain = case.run(varlen_attention)
    draws = [case.run(varlen_attention, dropout_p=0.25) for _ in range(400)]
    for name in ("out", "v"):
        values = torch.stack([draw[name] for draw in draws])
        assert ((values.mean(0) - plain[name]).abs() <= 6 * values.std(0) / 400**0.5 + 1e-5).all()
    weights = torch.randn(case.q.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).cuda()
    for draw in draws[:5]:  # sum(w * o) = sum_j v_j . dv_j, since o is linear in v
        left, right = (weights * draw["out"].double()).sum(), (case.v.double() * draw["v"].double()).sum()
        torch.testing.assert_close(left, right, atol=1e-2, rtol=1e-4)


def test_the_largest_score_is_recorded():
    """Over visible pairs, after scale and bias, raised in place."""
    case = make_case(LENGTHS, heads=3, dim=64, **FEATURES["all"]).to(torch.bfloat16, "cuda")
    bias = RelativeBias(case.table, case.max_distance)
    scores = reference_scores(case.q, case.k, case.cu_seqlens, **case.options, bias=bias)
    found = torch.tensor([-torch.inf, 1e4, 0.0], device="cuda")
    expected = found.maximum(scores.amax((1, 2)))
    case.run(varlen_attention, max_logits=found)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_nothing_waits_for_the_device():
    """With max_seqlen given no backend reads a number back, so the host runs ahead."""
    for features in FEATURES.values():
        for dtype in (torch.bfloat16, torch.float32):
            case = make_case([300, 200], heads=2, dim=64, **features).to(dtype, "cuda")
            bias = None if case.table is None else RelativeBias(case.table, case.max_distance)
            for dropout_p in (0.0, 0.1):
                call = (case.q, case.k, case.v, case.cu_seqlens, dropout_p)
                varlen_attention(*call, **case.options, bias=bias, max_seqlen=300).sum().backward()  # constants
                torch.cuda.set_sync_debug_mode("error")
                try:
                    varlen_attention(*call, **case.options, bias=bias, max_seqlen=300).sum().backward()
                finally:
                    torch.cuda.set_sync_debug_mode("default")
