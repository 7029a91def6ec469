"""The fused head and loss: exact, fp32 inside, indifferent to padding, ignored positions and chunking."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import TERMS, in_fp64, inputs, plain, run

from enc.kernels import masked_ce_torch
from enc.kernels.masked_ce import MaskedCEOutput, masked_ce, reference, why_not


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@settings(max_examples=60, deadline=None)
@given(
    positions=st.sampled_from([0, 1, 3, 252]),
    hidden=st.sampled_from([1, 8, 123]),
    columns=st.sampled_from([2, 64, 507]),
    padding=st.sampled_from([0, 1, 63]),
    with_bias=st.booleans(),
    terms=st.sets(st.sampled_from(sorted(TERMS))),
    seed=st.integers(0, 1000),
)
def test_fp64_meets_the_reference(positions, hidden, columns, padding, with_bias, terms, seed):
    """Loss, count and gradients to fp64 accuracy; the gradient of a padding column is exactly zero."""
    leaves, targets = inputs(positions, hidden, columns + padding, columns, with_bias, torch.float64, seed)
    ours, exact = (run(f, leaves, targets, columns, **{t: TERMS[t] for t in terms}) for f in (masked_ce, reference))
    torch.testing.assert_close(ours, exact, atol=1e-10, rtol=1e-10)
    assert all((grad[columns:] == 0).all() for grad in ours[4:])


@pytest.mark.parametrize(("positions", "kept_bytes"), [(100, 0), (252, 2**27), (252, 0)])
@pytest.mark.parametrize("case", ["fp32", "bf16"])
def test_logits_in_dw_in_memory_of_their_own_or_computed_again(monkeypatch, positions, kept_bytes, case):
    """Many ragged chunks meet the reference and repeat their bits, wherever the logits are in the meantime."""
    leaves, targets = inputs(positions, 123, 5007, 5000, True, torch.bfloat16 if case == "bf16" else torch.float32)
    exact = run(reference, in_fp64(leaves), targets, 5000, **TERMS)
    monkeypatch.setattr(masked_ce_torch, "_MAX_KEPT_BYTES", kept_bytes)
    monkeypatch.setattr(masked_ce_torch, "_CHUNK_LOGITS", dict.fromkeys((2, 4, 8), 1))
    found, again = (run(masked_ce, leaves, targets, 5000, **TERMS) for _ in range(2))
    torch.testing.assert_close(found, again, atol=0, rtol=0)
    tolerance = 2e-2 if case == "bf16" else 1e-5
    for ours, true in zip(found[:2] + found[3:], exact[:2] + exact[3:], strict=True):
        assert (ours - true).norm() <= tolerance * true.norm()


def test_a_second_backward_pass_finds_the_same():
    """Once the logits have been used up, they are computed again."""
    leaves, targets = inputs(30, 64, 507, 500, True)
    loss = masked_ce(*leaves, targets, 500, **TERMS).loss
    first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    torch.testing.assert_close(first, second, atol=0, rtol=0)


def test_gradcheck():
    """The derivative of the loss, terms and all, by finite differences."""
    leaves, targets = inputs(6, 4, 13, 11, True, torch.float64)
    assert torch.autograd.gradcheck(lambda *x: masked_ce(*x, targets, 11, **TERMS).loss, leaves)


def test_no_gradient_flows_through_logsumexp():
    leaves, targets = inputs(6, 4, 13, 11, True)
    found = masked_ce(*leaves, targets, 11)
    assert not found.logsumexp.requires_grad
    assert (found.logsumexp[targets == -100] == 0).all()


@pytest.mark.parametrize("case", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("size", [0.1, 3.0])
def test_error_is_that_of_the_same_dtype_in_pytorch(case, size):
    """Against fp64, flat and sharp logits: no worse than gather + F.cross_entropy in the same dtype, plus a little."""
    leaves, targets = inputs(252, 123, 507, 500, True, torch.bfloat16 if case == "bf16" else torch.float32)
    leaves = [(x * s).detach().requires_grad_() for x, s in zip(leaves, (1.0, size, size), strict=True)]
    exact = run(reference, in_fp64(leaves), targets, 500)
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        ours, theirs = (run(f, leaves, targets, 500) for f in (masked_ce, plain))
    assert ours[0].dtype == torch.float32
    assert [x.dtype for x in ours[3:]] == [x.dtype for x in leaves]
    for mine, other, true in zip(ours[3:], theirs[3:], exact[3:], strict=True):
        assert (mine - true).norm() <= 1.05 * (other - true).norm() + 1e-6 * true.norm()
    assert abs(ours[0] - exact[0]) <= 2 * abs(theirs[0] - exact[0]) + 2e-4 * exact[0]


def test_huge_logits_stay_finite():
    """Logits of 1e4 and more neither overflow nor lose the loss."""
    leaves, targets = inputs(252, 123, 507, 500, False)
    leaves[1] = (leaves[1] * 1000).detach().requires_grad_()
    exact = run(reference, in_fp64(leaves), targets, 500)
    for ours, true in zip(run(masked_ce, leaves, targets, 500), exact, strict=True):
        assert (ours.double() - true).norm() <= 1e-3 * true.double().norm()


@pytest.mark.parametrize("positions", [0, 5])
def test_without_labels_loss_and_gradients_are_zero(positions):
    """No position, or ignored positions alone (non-finite ones too): zero, with a graph."""
    leaves, _ = inputs(positions, 8, 64, 60, True)
    targets = torch.full((positions,), -100)
    with torch.no_grad():
        leaves[0][:1] = torch.nan
    loss, lse, correct, *grads = run(masked_ce, leaves, targets, 60, **TERMS)
    assert loss == 0
    assert (lse == 0).all()
    assert correct == 0
    assert all((grad == 0).all() for grad in grads)


def test_evaluation_makes_no_gradient():
    """Under no_grad the same value comes out, without a graph."""
    leaves, targets = inputs(252, 123, 507, 500, False)
    expected = masked_ce(*leaves, targets, 500)
    with torch.no_grad():
        found = masked_ce(*leaves, targets, 500)
    assert not found.loss.requires_grad
    torch.testing.assert_close(found, MaskedCEOutput(*(t.detach() for t in expected)), atol=0, rtol=0)


@pytest.mark.parametrize("target", [-1, 500, 506, 100_000])
def test_a_target_outside_of_the_classes_is_refused(target):
    """Padding columns are no classes either."""
    leaves, targets = inputs(5, 8, 507, 500, False)
    targets[2] = target
    with pytest.raises(RuntimeError, match="every target must be -100"):
        masked_ce(*leaves, targets, 500)


def test_strided_hidden_and_a_tied_weight():
    """A transposed view works, and a weight used twice gets the sum of both gradients."""
    weight = (torch.randn(50, 16) * 0.2).requires_grad_()
    rows, targets = torch.arange(7), torch.arange(7)
    losses = [f((weight[rows].T.contiguous().T * 2), weight, None, targets)[0] for f in (masked_ce, reference)]
    ours, exact = (torch.autograd.grad(loss, weight)[0] for loss in losses)
    torch.testing.assert_close(ours, exact)


def test_why_not_is_a_sentence():
    """The CPU has code of its own; a GPU has kernels for the dtypes of training."""
    assert why_not("cpu", torch.float64) is None
    assert "MPS" in why_not("mps", torch.float32)
    assert "float64" in why_not("cuda", torch.float64)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_is_a_third_of_pytorchs(dtype):
    """Resident memory beyond inputs and gradients, forward and backward, each side in a process of its own."""
    ours, theirs = (
        int(subprocess.run([sys.executable, "-c", MEASURE_PEAK, side, dtype], capture_output=True, check=True).stdout)
        for side in ("ours", "theirs")
    )
    assert ours <= theirs / 3


MEASURE_PEAK = """
import sys, torch, torch.nn.functional as F
from enc.kernels.masked_ce import masked_ce
side, dtype = sys.argv[1], getattr(torch, sys.argv[2])
torch.set_num_threads(1)

def run(positions, columns):
    x, w = torch.randn(positions, 768).to(dtype).requires_grad_(), torch.randn(columns, 768).to(dtype).requires_grad_()
    y = torch.randint(columns, (positions,))
    open("/proc/self/clear_refs", "w").write("5")  # the peak from here on
    before = resident("VmRSS")
    theirs = side == "theirs"
    loss = F.cross_entropy(F.linear(x, w), y, reduction="sum") if theirs else masked_ce(x, w, None, y).loss
    loss.backward()
    return resident("VmHWM") - before - x.grad.nbytes - w.grad.nbytes

def resident(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024

run(8, 300)  # loads code
print(run(205, 30592))
"""
