"""Rotary positions: the complex product, the real form and the fused gradient of qkv agree."""

import pytest
import torch
from elementwise import assert_as_exact, normal, outputs_and_gradients
from rope_cases import real

from enc.kernels import rope


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(50, 4, 3, 12), (1, 1, 3, 2), (0, 2, 3, 8), (700, 6, 3, 64)])
def test_as_exact_as_the_real_form(shape, dtype):
    """Values and gradients of a fused projection against fp64."""
    cos_sin = rope.rotary_cos_sin(torch.arange(shape[0]) % 17, shape[-1])
    grads = [normal(shape[0], shape[1], shape[3], seed=i) for i in (1, 2, 3)]
    assert_as_exact(
        lambda qkv: rope.rope_qkv(qkv, cos_sin), lambda qkv: real(qkv, cos_sin), [normal(*shape, dtype=dtype)], grads
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_tensor_is_rotated_as_a_part_of_qkv(dtype):
    """`rope` of a strided q gives the bits of `rope_qkv`, forward and backward; lengths stay."""
    qkv, cos_sin = normal(50, 4, 3, 12, dtype=dtype), rope.rotary_cos_sin(torch.arange(50), 12)
    grad = normal(50, 4, 12, dtype=dtype, seed=1)
    q, dq = outputs_and_gradients(lambda x: rope.rope(x, cos_sin), [qkv[:, :, 0]], [grad])
    leaf = qkv.requires_grad_()
    expected = rope.rope_qkv(leaf, cos_sin)[0]
    assert torch.equal(q, expected)
    assert torch.equal(dq, torch.autograd.grad(expected, leaf, grad)[0][:, :, 0])
    torch.testing.assert_close(q.float().norm(dim=-1), qkv[:, :, 0].float().norm(dim=-1), rtol=1e-2, atol=1e-2)


def test_scores_depend_on_the_distance_alone():
    """q . k of two tokens is the same wherever the pair stands."""
    q, k = normal(1, 1, 16), normal(1, 1, 16, seed=1)

    def score(i: int, j: int) -> torch.Tensor:
        a, b = (rope.rope(x, rope.rotary_cos_sin(torch.tensor([p]), 16)) for x, p in ((q, i), (k, j)))
        return (a * b).sum()

    torch.testing.assert_close(score(3, 10), score(203, 210), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")  # dynamo's own deprecations
def test_compiled_equals_eager():
    qkv, cos_sin = normal(20, 2, 3, 8), rope.rotary_cos_sin(torch.arange(20), 8)
    grads = [normal(20, 2, 8, seed=i) for i in (1, 2, 3)]
    compiled = torch.compile(lambda x: rope.rope_qkv(x, cos_sin), backend="aot_eager", fullgraph=True)
    found, expected = (outputs_and_gradients(f, [qkv], grads) for f in (compiled, lambda x: rope.rope_qkv(x, cos_sin)))
    torch.testing.assert_close(found, expected)


def test_why_not():
    assert "CPU" in rope.why_not("cpu", torch.float32)
    assert "float64" in rope.why_not("cuda", torch.float64)
