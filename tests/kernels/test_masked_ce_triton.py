"""The Triton kernels of the loss, in Triton's interpreter: both methods compute what the definition says."""

import os

import pytest
import torch
from loss_cases import TERMS, in_fp64, inputs, plain, run

from enc.kernels import masked_ce as module
from enc.kernels.masked_ce import masked_ce, reference

store = pytest.importorskip("enc.kernels.masked_ce_triton_store", reason="triton is not installed")
recompute = pytest.importorskip("enc.kernels.masked_ce_triton_recompute", reason="triton is not installed")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU runs tests/gpu instead")


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    """Several chunks of positions and columns, also at small sizes."""
    monkeypatch.setattr(store, "BUFFER_BYTES", 1)
    monkeypatch.setattr(recompute, "BUFFER_BYTES", 1)
    monkeypatch.setattr(recompute, "_MIN_COLUMNS", 100)
    monkeypatch.setattr(recompute, "_PROGRAMS", 7)


@pytest.fixture(params=["store", "recompute"])
def method(request, monkeypatch):
    """Send calls on the CPU to the kernels."""
    monkeypatch.setattr(module, "_method", lambda *_: request.param)
    return request.param


@pytest.mark.parametrize("shape", [(252, 123, 507, 500), (1, 64, 33, 33), (130, 64, 257, 200)])
@pytest.mark.parametrize("terms", [{}, TERMS], ids=["plain", "terms"])
def test_fp32_meets_the_reference(method, shape, terms):
    """Loss, logsumexp, count and gradients; padded columns get exactly zero; two runs agree in every bit."""
    positions, hidden, columns, classes = shape
    leaves, targets = inputs(positions, hidden, columns, classes, bool(terms))
    ours, again = (run(masked_ce, leaves, targets, classes, **terms) for _ in range(2))
    torch.testing.assert_close(ours, again, atol=0, rtol=0)
    exact = run(reference, in_fp64(leaves), targets, classes, **terms)
    assert ours[2] == exact[2]
    for mine, true in zip(ours, exact, strict=True):
        assert (mine - true).double().norm() <= 1e-5 * true.double().norm() + 1e-12
    assert all((grad[classes:] == 0).all() for grad in ours[4:])


@pytest.mark.parametrize("autocast", [False, True])
def test_error_of_bf16_is_that_of_pytorch(method, autocast):
    """Against fp64: no worse than gather + F.cross_entropy in the same dtype."""
    leaves, targets = inputs(252, 128, 507, 500, True, torch.float32 if autocast else torch.bfloat16)
    exact = run(reference, in_fp64(leaves), targets, 500)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, theirs = (run(f, leaves, targets, 500) for f in (masked_ce, plain))
    assert [x.dtype for x in ours[3:]] == [x.dtype for x in leaves]
    for mine, other, true in zip(ours[3:], theirs[3:], exact[3:], strict=True):
        assert (mine - true).norm() <= 1.05 * (other - true).norm() + 1e-6 * true.norm()
    assert abs(ours[0] - exact[0]) <= 1.05 * abs(theirs[0] - exact[0]) + 1e-4 * exact[0]


def test_huge_logits_stay_finite(method):
    leaves, targets = inputs(130, 64, 257, 250, False)
    leaves[1] = (leaves[1] * 1000).detach().requires_grad_()
    for ours, true in zip(
        run(masked_ce, leaves, targets, 250), run(reference, in_fp64(leaves), targets, 250), strict=True
    ):
        assert (ours - true).double().norm() <= 1e-3 * true.double().norm()


def test_without_labels_loss_and_gradients_are_zero(method):
    """Ignored positions alone, non-finite ones too."""
    leaves, _ = inputs(5, 64, 64, 60, True)
    with torch.no_grad():
        leaves[0][:1] = torch.nan
    for found in run(masked_ce, leaves, torch.full((5,), -100), 60, **TERMS):
        assert (found == 0).all()


def test_hidden_and_weights_with_strides_and_a_tied_weight(method):
    """Transposed views work, and a weight used twice gets the sum of both gradients."""
    base = (torch.randn(64, 50) * 0.2).requires_grad_()
    targets = torch.arange(7)
    losses = [f((base.T[:7].T.contiguous().T * 2), base.T, None, targets).loss for f in (masked_ce, reference)]
    ours, exact = (torch.autograd.grad(loss, base)[0] for loss in losses)
    torch.testing.assert_close(ours, exact)


def test_equal_logits_count_the_first_class(method):
    """As argmax does."""
    hidden, weight = torch.zeros(3, 64), torch.ones(70, 64)
    assert masked_ce(hidden, weight, None, torch.tensor([0, 1, 69])).num_correct == 1


def test_a_second_backward_pass_finds_the_same_or_refuses(method):
    """What was stored is scaled in place by the first."""
    leaves, targets = inputs(30, 64, 70, 64, True)
    loss = masked_ce(*leaves, targets, 64).loss * 0.3
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    if method == "store":
        with pytest.raises(RuntimeError, match="used up by a first backward pass"):
            torch.autograd.grad(loss, leaves)
    else:
        torch.testing.assert_close(first, torch.autograd.grad(loss, leaves), atol=0, rtol=0)


def test_evaluation_makes_no_gradient(method):
    leaves, targets = inputs(130, 64, 257, 250, False)
    expected = masked_ce(*leaves, targets, 250)
    with torch.no_grad():
        found = masked_ce(*leaves, targets, 250)
    assert not found.loss.requires_grad
    torch.testing.assert_close(tuple(found), tuple(t.detach() for t in expected), atol=0, rtol=0)
