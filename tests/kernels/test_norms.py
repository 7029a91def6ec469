"""RMSNorm and LayerNorm with their residual sum: as exact as separate operations, one token blind to the others."""

import pytest
import torch
from elementwise import EPS, assert_as_exact, normal
from norm_cases import DTYPES, case, fused, plain

from enc.kernels import norms

SHAPES = [(252, 123), (1, 8), (0, 16), (3, 5, 48), (700, 384)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("with_branch", [False, True])
def test_as_exact_as_separate_operations(shape, dtypes, centered, with_branch):
    """Values and all gradients against fp64: no worse than autograd through the definition in the same dtype."""
    inputs, grads = case(shape, dtypes, centered, with_branch)
    kind = centered, with_branch
    assert_as_exact(fused(*kind, dtypes[2]), plain(*kind, dtypes[2]), inputs, grads)


@pytest.mark.parametrize("centered", [False, True])
def test_gradients_of_either_output_alone(centered):
    """The sum's gradient passes through, and without it that of the norm is the whole."""
    inputs, (outer, grad) = case((40, 24), DTYPES["fp32"], centered, True)
    for chosen in ([outer, torch.zeros_like(grad)], [torch.zeros_like(outer), grad]):
        leaves = [x.requires_grad_() for x in inputs]
        outputs = fused(centered, True)(*leaves)
        expected = torch.autograd.grad(outputs, leaves, chosen)
        index = 0 if chosen[0] is outer else 1
        found = torch.autograd.grad(
            fused(centered, True)(*leaves)[index], leaves, chosen[index], allow_unused=True, materialize_grads=True
        )
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("centered", [False, True])
def test_a_token_is_blind_to_the_others(centered):
    """The sum and norm of a token have the bits that they have alone, whatever block it stands in."""
    inputs, _ = case((700, 384), DTYPES["autocast"], centered, True)
    together = fused(centered, True, torch.bfloat16)(*inputs)
    for token in (0, 682, 699):
        alone = fused(centered, True, torch.bfloat16)(*[x[token : token + 1] if x.dim() == 2 else x for x in inputs])
        for a, b in zip(together, alone, strict=True):
            assert torch.equal(a[token], b[0])


def test_strided_inputs_and_gradients():
    """Columns of wider tensors give what their copies give."""
    wide, weight = normal(60, 40), normal(20, seed=1)
    results = []
    for x in (wide[:, ::2], wide[:, ::2].contiguous()):
        leaf = x.requires_grad_()
        y = norms.rms_norm(leaf, weight, EPS)
        results.append((y, torch.autograd.grad(y, leaf, wide[:, 1::2])[0]))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("scale", [1e-18, 1e15])
def test_extreme_tokens(scale):
    """Neither tiny nor huge tokens give anything but finite numbers."""
    x = (normal(5, 64) * scale).requires_grad_()
    y = norms.rms_norm(x, torch.ones(64), EPS)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert y.isfinite().all()
    assert dx.isfinite().all()


@pytest.mark.filterwarnings("ignore")  # dynamo's own deprecations
def test_compiled_equals_eager():
    """Under torch.compile the definition is traced, without a graph break."""
    inputs, grads = case((30, 16), DTYPES["fp32"], True, True)
    compiled = torch.compile(fused(True, True), backend="aot_eager", fullgraph=True)
    assert_as_exact(compiled, plain(True, True), inputs, grads)


def test_why_not():
    assert "CPU" in norms.why_not("cpu", torch.float32)
    assert "float64" in norms.why_not("cuda", torch.float64)
    assert "20000" in norms.why_not("cuda", torch.bfloat16, 20000)
