"""Norms, rope and the gate on a GPU: the Triton kernels at real sizes, as exact as separate operations, same bits."""

import pytest
import torch
import torch.nn.functional as F
from elementwise import EPS, assert_as_exact, normal, outputs_and_gradients

from enc.kernels import norms, rope, swiglu

TOKENS = 8191
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16,) * 2,
    "autocast": (torch.float32, torch.bfloat16),
}


def on_gpu(*shape: int, **options) -> torch.Tensor:
    return normal(*shape, device="cuda", **options)


def norm_case(size: int, dtypes, centered: bool, tokens: int = TOKENS):
    inputs = [on_gpu(tokens, size, dtype=dtypes[0]), on_gpu(tokens, size, dtype=dtypes[1], seed=1)]
    inputs += [1 + 0.3 * on_gpu(size, seed=2), *[on_gpu(size, seed=3)] * centered]
    return inputs, [on_gpu(tokens, size, seed=4), on_gpu(tokens, size, seed=5)]


def add_norm(centered: bool, dtype=None):
    function = norms.add_layer_norm if centered else norms.add_rms_norm
    return lambda *tensors: function(*tensors, EPS, dtype)


def plain_add_norm(dtype=None):
    def function(x, branch, weight, bias=None):
        y_dtype = None if x.dtype == torch.float64 else dtype
        return norms.reference(x, weight, EPS, y_dtype, branch=branch, bias=bias)

    return function


@pytest.mark.parametrize("size", [1, 123, 384, 768, 1024, 4096])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("centered", [False, True])
def test_norms_are_as_exact_as_separate_operations(size, dtypes, centered):
    """Sum, norm and all gradients against fp64."""
    assert norms.why_not("cuda", dtypes[0], size) is None
    inputs, grads = norm_case(size, dtypes, centered)
    dtype = torch.bfloat16 if dtypes[1] == torch.bfloat16 else None
    assert_as_exact(add_norm(centered, dtype), plain_add_norm(dtype), inputs, grads)


@pytest.mark.parametrize("tokens", [0, 1])
def test_no_token_and_one(tokens):
    inputs, grads = norm_case(768, DTYPES["autocast"], True, tokens)
    assert_as_exact(add_norm(True), plain_add_norm(), inputs, grads)


@pytest.mark.parametrize("centered", [False, True])
def test_norms_have_the_same_bits_each_time(centered):
    """The sums over tokens too; and a token's bits do not depend on the others."""
    inputs, grads = norm_case(768, DTYPES["autocast"], centered, 65_536)
    first, second = (outputs_and_gradients(add_norm(centered), inputs, grads) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    few = outputs_and_gradients(
        add_norm(centered), [x[:5] if x.dim() == 2 else x for x in inputs], [g[:5] for g in grads]
    )
    for together, alone in zip(first[:4], few[:4], strict=True):
        assert torch.equal(together[:5], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [2, 12, 64, 96, 128])
def test_rope_is_as_exact_as_the_real_form(head_dim, dtype):
    """q, k, v and the gradient of qkv against fp64."""
    cos_sin = rope.rotary_cos_sin(torch.arange(TOKENS, device="cuda") % 509, head_dim)

    def plain(qkv):
        wide = cos_sin.to(torch.promote_types(qkv.dtype, torch.float32))[:, None, None]
        return *rope.reference(qkv[:, :, :2], wide).unbind(2), qkv[:, :, 2]

    qkv, grads = on_gpu(TOKENS, 6, 3, head_dim, dtype=dtype), [on_gpu(TOKENS, 6, head_dim, seed=i) for i in (1, 2, 3)]
    assert_as_exact(lambda x: rope.rope_qkv(x, cos_sin), plain, [qkv], grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(TOKENS, 2048), (252, 123), (1, 1), (0, 8)])
def test_the_gate_is_as_exact_as_two_operations(shape, dtype):
    inputs = [on_gpu(*shape, dtype=dtype, seed=i) for i in (0, 1)]
    assert_as_exact(swiglu.swiglu, swiglu.reference, inputs, [on_gpu(*shape, seed=2)])


def test_places_beyond_two_to_the_31():
    """Rows past the 2^31st number are reached: offsets have 64 bits."""
    a = torch.ones(2**21 + 3, 1024, dtype=torch.bfloat16, device="cuda")
    a[-1] = 2
    h = swiglu.swiglu(a, a)
    torch.testing.assert_close(h[-1].float(), (F.silu(a[-1].float()) * 2), rtol=1e-2, atol=1e-2)
    y = norms.rms_norm(a, torch.ones(1024, device="cuda"), EPS, torch.bfloat16)
    assert (y[-1] - 1).abs().max() < 1e-2
