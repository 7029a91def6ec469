"""Packed attention: exact, blind across documents, opaque to torch.compile."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from enc.kernels.varlen_attention import _varlen_attention, reference, varlen_attention, why_not


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def packed(lengths: list[int], heads: int = 3, dim: int = 8, dtype=torch.float32, seed: int = 0):
    """Return a fused (T, H, 3, D) tensor, as a qkv projection makes it, and cu_seqlens."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(sum(lengths), heads, 3, dim, generator=generator, dtype=torch.float64).to(dtype)
    return qkv.requires_grad_(), torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


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


def test_no_document_sees_another():
    """Changing one document leaves the bits of all other outputs and gradients."""
    qkv, cu_seqlens = packed([20, 33, 7])
    changed = qkv.detach().clone()
    changed[20:53] = torch.randn(33, 3, 3, 8)
    grad = torch.randn(60, 3, 8)
    before, after = (run(varlen_attention, x, cu_seqlens, grad) for x in (qkv, changed.requires_grad_()))
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[:20], b[:20])
        assert torch.equal(a[53:], b[53:])
        assert not torch.equal(a[20:53], b[20:53])


def test_strided_and_contiguous_inputs_give_the_same_bits():
    """Views of a fused projection need no copy; an expanded gradient is accepted."""
    qkv, cu_seqlens = packed([20, 33, 7])
    strided = varlen_attention(*qkv.unbind(2), cu_seqlens)
    assert torch.equal(strided, varlen_attention(*(x.contiguous() for x in qkv.unbind(2)), cu_seqlens))
    (from_sum,) = torch.autograd.grad(strided.sum(), qkv, retain_graph=True)
    assert torch.equal(from_sum, torch.autograd.grad(strided, qkv, torch.ones_like(strided))[0])


def test_dropout_keeps_the_mean_and_follows_the_seed():
    """The mean over many draws is the output without dropout; one seed is one draw."""
    qkv, cu_seqlens = packed([6, 11])
    q, k, v = qkv.detach().unbind(2)
    torch.manual_seed(0)
    draws = torch.stack([varlen_attention(q, k, v, cu_seqlens, dropout_p=0.25) for _ in range(2000)])
    error = (draws.mean(0) - varlen_attention(q, k, v, cu_seqlens)).abs()
    assert (error <= 5 * draws.std(0) / 2000**0.5 + 1e-6).all()
    torch.manual_seed(0)
    assert torch.equal(varlen_attention(q, k, v, cu_seqlens, dropout_p=0.25), draws[0])
    ones = varlen_attention(q, k, torch.ones_like(v), cu_seqlens, dropout_p=0.25)
    assert not torch.allclose(ones, torch.ones_like(ones))


@pytest.mark.parametrize("bounds", [[0, 5], [1, 10], [0, 7, 3, 10], [0, 12]])
def test_bad_boundaries_are_refused(bounds):
    """Every token belongs to exactly one document."""
    q = torch.randn(10, 2, 4)
    with pytest.raises(ValueError, match="rise from 0 to the number of tokens, 10"):
        varlen_attention(q, q, q, torch.tensor(bounds, dtype=torch.int32))


@pytest.mark.filterwarnings("ignore")  # opcheck's own
def test_the_op_obeys_pytorchs_rules():
    """Schema, fake kernel, autograd registration and AOT tracing, by PyTorch's own checker."""
    qkv, cu_seqlens = packed([5, 9])
    leaves = [x.detach().requires_grad_() for x in qkv.unbind(2)]
    torch.library.opcheck(_varlen_attention, (*leaves, cu_seqlens, 0.3))


def test_why_not_is_a_sentence():
    """It names the device, and says what runs instead."""
    assert "CPU" in why_not("cpu", torch.float32)
    assert "cuda" in why_not("cuda", torch.bfloat16)
