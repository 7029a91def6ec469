"""The gate of SwiGLU: on the CPU two operations, which stay what they are."""

import pytest
import torch
from elementwise import assert_as_exact, normal

from enc.kernels import swiglu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(252, 123), (1, 8), (0, 16), (3, 5, 48)])
def test_equals_the_definition(shape, dtype):
    """silu(a) b with a sigmoid written out, against fp64, within rounding."""

    def definition(a, b):
        return (a / (1 + torch.exp(-a))) * b

    inputs = [normal(*shape, dtype=dtype, seed=i) for i in (0, 1)]
    assert_as_exact(swiglu.swiglu, definition, inputs, [normal(*shape, seed=2)])


def test_why_not():
    assert "CPU" in swiglu.why_not("cpu", torch.float32)
    assert "float64" in swiglu.why_not("cuda", torch.float64)
