"""The Triton kernel of rope in Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton")
from elementwise import INTERPRETER_EXTRA, assert_as_exact, normal
from rope_cases import real

from enc.kernels import rope, rope_triton


@pytest.fixture(autouse=True)
def _kernels_on_the_cpu(monkeypatch):
    monkeypatch.setattr(rope, "_rotate", lambda x, cos_sin, out, back=False: rope_triton.rotate(x, cos_sin, out, back))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(50, 4, 3, 12), (1, 1, 3, 2), (0, 2, 3, 8), (33, 5, 3, 64)])
def test_as_exact_as_the_real_form(shape, dtype):
    """Values and gradients of a fused projection against fp64."""
    cos_sin = rope.rotary_cos_sin(torch.arange(shape[0]) % 17, shape[-1])
    grads = [normal(shape[0], shape[1], shape[3], seed=i) for i in (1, 2, 3)]
    ours, plain, qkv = lambda x: rope.rope_qkv(x, cos_sin), lambda x: real(x, cos_sin), normal(*shape, dtype=dtype)
    assert_as_exact(ours, plain, [qkv], grads, INTERPRETER_EXTRA[dtype])


def test_one_tensor():
    """(T, H, D), strided too."""
    x, cos_sin = normal(30, 4, 24)[:, :, ::2], rope.rotary_cos_sin(torch.arange(30), 12)
    torch.testing.assert_close(rope.rope(x, cos_sin), rope.reference(x, cos_sin[:, None]))
