"""The Triton kernels of the gate in Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton")
from elementwise import INTERPRETER_EXTRA, assert_as_exact, normal

from enc.kernels import swiglu


@pytest.fixture(autouse=True)
def _kernels_on_the_cpu(monkeypatch):
    monkeypatch.setattr(swiglu, "why_not", lambda device, dtype: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(252, 123), (1, 80), (0, 16), (3, 5, 48)])
def test_as_exact_as_two_operations(shape, dtype):
    """Value and both gradients against fp64."""
    inputs = [normal(*shape, dtype=dtype, seed=i) for i in (0, 1)]
    assert_as_exact(swiglu.swiglu, swiglu.reference, inputs, [normal(*shape, seed=2)], INTERPRETER_EXTRA[dtype])


@pytest.mark.filterwarnings("ignore:overflow")  # in NumPy's exp
def test_huge_values():
    """Neither exponential overflows into the result."""
    a, b = torch.tensor([1e4, -1e4, 88.0, -88.0, 0.0]).requires_grad_(), torch.ones(5).requires_grad_()
    h = swiglu.swiglu(a, b)
    torch.testing.assert_close(h, swiglu.reference(a, b))
    for found, expected in zip(
        torch.autograd.grad(h.sum(), (a, b)), torch.autograd.grad(swiglu.reference(a, b).sum(), (a, b)), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_strided_inputs():
    wide = normal(20, 40)
    found, expected = (swiglu.swiglu(*pair) for pair in (wide.chunk(2, 1), [x.contiguous() for x in wide.chunk(2, 1)]))
    assert torch.equal(found, expected)
