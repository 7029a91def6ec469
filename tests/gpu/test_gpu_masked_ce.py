"""The loss on a GPU at real sizes: errors no larger than PyTorch's, every bit repeated, little memory, all methods."""

import pytest
import torch
from loss_cases import TERMS, in_fp64, inputs, plain, run

from enc.kernels import masked_ce as module
from enc.kernels.masked_ce import masked_ce, reference, why_not

MiB = 2**20


def on_gpu(leaves, targets):
    return [x if x is None else x.detach().cuda().requires_grad_() for x in leaves], targets.cuda()


@pytest.fixture(params=["store", "recompute", "torch"])
def method(request, monkeypatch):
    """Take one method, whatever the table says."""
    monkeypatch.setattr(module, "_method", lambda *_: request.param)
    return request.param


def test_kernels_run_here():
    assert why_not("cuda", torch.bfloat16) is None


@pytest.mark.parametrize("case", ["bf16", "fp16", "autocast", "fp32"])
@pytest.mark.parametrize("shape", [(252, 123, 507, 500), (4000, 768, 30592, 30522), (3000, 256, 50304, 50265)])
@pytest.mark.parametrize("terms", [{}, TERMS], ids=["plain", "terms"])
def test_error_is_that_of_the_same_dtype_in_pytorch(method, case, shape, terms):
    """Against fp64: no worse than gather + F.cross_entropy in the same dtype; padding gets exactly zero."""
    positions, hidden, columns, classes = shape
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(case, torch.float32)
    leaves, targets = on_gpu(*inputs(positions, hidden, columns, classes, True, dtype))
    with torch.no_grad():
        leaves[1] *= hidden**-0.5
    exact = run(reference, in_fp64(leaves), targets, classes, **terms)
    with torch.autocast("cuda", torch.bfloat16, enabled=case == "autocast"):
        ours = run(masked_ce, leaves, targets, classes, **terms)
        theirs = run(_same_dtype if terms else plain, leaves, targets, classes, **terms)
    for mine, other, true in zip(ours[3:], theirs[3:], exact[3:], strict=True):
        assert (mine - true).norm() <= 1.05 * (other - true).norm() + 1e-6 * true.norm()
        assert (mine[classes:] == 0).all() or len(mine) == positions
    assert abs(ours[0] - exact[0]) <= 1.05 * abs(theirs[0] - exact[0]) + 1e-5 * exact[0]


def _same_dtype(hidden, weight, bias, targets, valid, **terms):
    logits = torch.nn.functional.linear(hidden, weight, bias)[:, :valid].float()
    return module.from_logits(logits, targets, **terms)


def test_two_runs_agree_in_every_bit(method):
    leaves, targets = on_gpu(*inputs(4000, 768, 30592, 30522, True, torch.bfloat16))
    first, second = (run(masked_ce, leaves, targets, 30522, **TERMS) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_huge_logits_stay_finite(method):
    leaves, targets = on_gpu(*inputs(252, 128, 507, 500, False, torch.bfloat16))
    with torch.no_grad():
        leaves[1] *= 1000
    exact = run(reference, in_fp64(leaves), targets, 500)
    for ours, true in zip(run(masked_ce, leaves, targets, 500), exact, strict=True):
        assert (ours - true).double().norm() <= 2e-2 * true.double().norm()


@pytest.mark.parametrize("positions", [0, 1, 300])
def test_without_labels_loss_and_gradients_are_zero(method, positions, monkeypatch):
    """No position, or ignored positions alone (non-finite ones too)."""
    if positions == 0:
        monkeypatch.undo()  # no kernel runs on nothing
    leaves, _ = inputs(positions, 128, 507, 500, True, torch.bfloat16)
    leaves, targets = on_gpu(leaves, torch.full((positions,), -100))
    with torch.no_grad():
        leaves[0][:1] = torch.nan
    for found in run(masked_ce, leaves, targets, 500, **TERMS):
        assert (found == 0).all()


@pytest.mark.parametrize("shape", [(13107, 768, 30592), (9830, 768, 128256)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_memory_beyond_inputs_and_gradients(shape, dtype):
    """At most twice an fp32 dW and 64 MiB, under bf16 autocast for fp32 weights."""
    positions, hidden, columns = shape
    leaves, targets = on_gpu(*inputs(positions, hidden, columns, columns - 70, False, dtype))
    for _ in range(2):  # workspaces exist after the first
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            loss = masked_ce(*leaves, targets, columns - 70).loss
        grads = torch.autograd.grad(loss, leaves[:2])
        extra = torch.cuda.max_memory_allocated() - before - sum(g.nbytes for g in grads)
        del grads, loss
    print(f"{shape}, {dtype}: {extra / MiB:.0f} MiB beyond inputs and gradients")
    assert extra <= 2 * 4 * leaves[1].numel() + 64 * MiB


def test_the_torch_path_serves_fp64():
    leaves, targets = on_gpu(*inputs(252, 123, 507, 500, True, torch.float64))
    ours, exact = (run(f, leaves, targets, 500, **TERMS) for f in (masked_ce, reference))
    torch.testing.assert_close(ours, exact, atol=1e-10, rtol=1e-10)
