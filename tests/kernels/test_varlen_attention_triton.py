"""The Triton kernels of packed attention, run by Triton's interpreter where there is no GPU."""

import os

import pytest
import torch
import torch.nn.functional as F
from attention_cases import Case, bounds, cases, make_case, two_streams
from hypothesis import given, settings

from enc.kernels.attention_rules import RelativeBias, Rules
from enc.kernels.varlen_attention import reference, reference_scores

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("tests/gpu runs these kernels", allow_module_level=True)

from enc.kernels import varlen_attention_triton as launchers
from enc.kernels.varlen_attention_triton import Blocks


@pytest.fixture(autouse=True, scope="module")
def _small_blocks():
    """Blocks so small that short documents have several, and that differ from kernel to kernel."""
    cuts = {"forward": Blocks(16, 32, 4, 1), "dq": Blocks(32, 16, 4, 1), "dk_dv": Blocks(16, 16, 4, 1)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launchers, "blocks", lambda kernel, q, **rules: cuts[kernel])
        yield


def run(case: Case, dropout_p: float = 0.0, seed: int = 0) -> dict[str, torch.Tensor]:
    """Launch the kernels as the public function does, with the weights of ``Case.run``."""
    (q, k, v, table, drawn, rules), (out, lse, peak) = run_forward(case, dropout_p, seed)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(out.dtype)
    grads = launchers.backward(weights, out, lse, q, k, v, table, drawn, rules)
    names = ("q", "k", "v") if table is None else ("q", "k", "v", "table")
    return {"out": out, "peak": peak, **dict(zip(names, grads, strict=False))}


def run_forward(case: Case, dropout_p: float, seed: int) -> tuple[tuple, tuple]:
    q, k, v, table = (None if x is None else x.detach() for x in (case.q, case.k, case.v, case.table))
    options = {"positions": (None, None), "stages": (None, None), "cu_seqlens_q": None, "window": None} | case.options
    rules = Rules(
        case.cu_seqlens, options["cu_seqlens_q"], *options["positions"], *options["stages"], None,
        options["scale"] or q.shape[-1] ** -0.5, dropout_p, options["window"], case.max_distance, True,
    )  # fmt: skip
    inputs = q, k, v, table, torch.tensor([seed]) if dropout_p > 0 else None, rules
    return inputs, launchers.forward(*inputs)


@settings(max_examples=15, deadline=None)
@given(case=cases(max_documents=3, dims=(5, 16)))
def test_all_features_together_meet_the_reference(case):
    """Output and every gradient, for any features, documents without tokens and odd head sizes, to fp32 accuracy."""
    exact = case.run(reference)
    found = run(case.to(torch.float32))
    for name, true in exact.items():
        assert (found[name] - true).norm() <= 2e-6 * true.norm() + 1e-6 * true.numel() ** 0.5, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("size", [1.0, 10.0])
def test_the_error_is_that_of_the_same_dtype_in_pytorch(dtype, size):
    """Against fp64, at most that of SDPA in the same dtype under a dense bias, plus a little."""
    case = make_case([70], heads=2, dim=16, buckets=(32, 128), stages=True, size=size).to(dtype)
    exact = case.to(torch.float64).run(reference)

    def sdpa(q, k, v, cu_seqlens, *, bias, **options):
        dense = reference_scores(torch.zeros_like(q), k, cu_seqlens, bias=bias, **options).detach().to(dtype)
        heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(*heads_first, attn_mask=dense[None])[0].transpose(0, 1)
        return torch.where((dense > -torch.inf).any(2).T[..., None], out, 0.0) + 0 * bias.table.sum()

    found, theirs = run(case), case.errors(exact, sdpa)
    for name in ("out", "q", "k", "v"):
        error, norm = float((found[name] - exact[name]).norm()), theirs[name][1]
        assert error <= 1.05 * theirs[name][0] + 2e-6 * size * norm, name


def test_fused_projections_need_no_copy():
    """Views of one projection and an expanded gradient give the numbers of contiguous tensors."""
    qkv = torch.randn(37, 2, 3, 8)
    rules = Rules(bounds([30, 7]), None, None, None, None, None, None, 0.3, 0.0, None, 0)
    results = []
    for copy in (False, True):
        q, k, v = ((x.contiguous() if copy else x) for x in qkv.unbind(2))
        out, lse, _ = launchers.forward(q, k, v, None, None, rules)
        grad = torch.ones(1, 1, 1).expand(out.shape)
        grads = launchers.backward(grad.contiguous() if copy else grad, out, lse, q, k, v, None, None, rules)
        results.append((out, lse, *grads))
    torch.testing.assert_close(*results, atol=0, rtol=0)


def test_the_largest_score_of_each_head_is_found():
    """Over visible pairs only, after scale and bias."""
    case = make_case([40, 0, 9], heads=3, buckets=(8, 16), stages=True, window=6).to(torch.float32)
    found = run(case)["peak"]
    bias = RelativeBias(case.table, case.max_distance)
    scores = reference_scores(case.q, case.k, case.cu_seqlens, **case.options, bias=bias)
    torch.testing.assert_close(found, scores.amax((1, 2)))


def test_mpnets_two_streams():
    """With the masks of the paper, through the kernels."""
    options, visible, num_queries, num_keys = two_streams(30, 6)
    q, k, v = torch.randn(num_queries, 2, 8), torch.randn(num_keys, 2, 8), torch.randn(num_keys, 2, 8)
    case = Case(q, k, v, None, bounds([num_keys]), options | {"scale": None})
    scores = torch.einsum("ihd,jhd->hij", q, k) / 8**0.5
    expected = torch.einsum("hij,jhd->ihd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)
    torch.testing.assert_close(run(case)["out"], expected)


def mask_of(case: Case, dropout_p: float, seed: int) -> torch.Tensor:
    """Return dropout's factors (H, Tq, T), read off the output for values that are unit vectors."""
    scores_of_one = Case(
        torch.zeros_like(case.q), torch.zeros_like(case.k), case.v, None, case.cu_seqlens, case.options
    )
    tokens, _, dim = case.k.shape
    columns = []
    for first in range(0, tokens, dim):
        scores_of_one.v = torch.zeros_like(case.v)
        rows = torch.arange(first, min(first + dim, tokens))
        scores_of_one.v[rows, :, rows - first] = 1.0
        columns.append(run(scores_of_one, dropout_p, seed)["out"][..., : len(rows)])
    return torch.cat(columns, -1).transpose(0, 1) * tokens


def test_dropout_is_one_mask_in_both_passes():
    """Output and gradients are those of the formula under the mask that the forward kernel drew."""
    case = make_case([45], heads=2, dim=16, buckets=(8, 16)).to(torch.float32)
    factors = mask_of(case, 0.3, seed=2**40 + 5)
    assert factors.unique().numel() == 2
    assert factors.max() == pytest.approx(1 / 0.7, rel=1e-5)

    def dropped(q, k, v, cu_seqlens, **options):
        p = reference_scores(q, k, cu_seqlens, **options).softmax(-1)
        return torch.einsum("hij,jhd->ihd", p * factors, v)

    found, expected = run(case, 0.3, 2**40 + 5), case.run(dropped)
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, atol=2e-5, rtol=2e-5)


def test_dropout_keeps_the_mean_and_follows_the_seed():
    """The share of dropped weights is the probability; seeds, heads, queries and keys have masks of their own."""
    case = make_case([64], heads=2, dim=64).to(torch.float32)
    first, again, other = (mask_of(case, 0.25, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    for mask in (first, other):
        count = mask.numel()
        assert abs(float((mask == 0).sum()) / count - 0.25) < 5 * (0.25 * 0.75 / count) ** 0.5
    kept = (first != 0).double()
    pairs = [(kept[0], kept[1]), (kept, (other != 0).double()), (kept[:, 1:], kept[:, :-1])]
    for lag in (1, 2, 3, 4):  # four scores share a draw
        pairs.append((kept[..., lag:], kept[..., :-lag]))
    for a, b in pairs:
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(float(correlation)) < 5 / a.numel() ** 0.5


def test_everything_dropped_is_zero():
    """A probability of one leaves zeros, not NaN."""
    results = run(make_case([20], dim=8).to(torch.float32), dropout_p=1.0)
    for name in ("out", "q", "k", "v"):
        assert (results[name] == 0).all(), name
