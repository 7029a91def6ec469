"""The Triton kernels of the norms in Triton's interpreter: what they compute, not how fast."""

import pytest
import torch

pytest.importorskip("triton")
from elementwise import EPS, INTERPRETER_EXTRA, assert_as_exact, normal
from norm_cases import DTYPES, case, fused, plain

from enc.kernels import norms, norms_triton


@pytest.fixture(autouse=True)
def _kernels_on_the_cpu(monkeypatch):
    monkeypatch.setattr(norms, "_forward", norms_triton.forward)
    monkeypatch.setattr(norms, "_backward", norms_triton.backward)


@pytest.mark.parametrize("shape", [(252, 123), (1, 80), (0, 16), (3, 5, 48)])
@pytest.mark.parametrize(
    "dtypes", [DTYPES["fp32"], DTYPES["bf16"], DTYPES["autocast"]], ids=["fp32", "bf16", "autocast"]
)
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("with_branch", [False, True])
def test_as_exact_as_separate_operations(shape, dtypes, centered, with_branch):
    """Values and all gradients against fp64: no worse than autograd through the definition in the same dtype."""
    kind = centered, with_branch, dtypes[2]
    extra = INTERPRETER_EXTRA[dtypes[1]]
    assert_as_exact(fused(*kind), plain(*kind), *case(shape, dtypes, centered, with_branch), extra)


def test_more_tiles_than_programs(monkeypatch):
    """A program of the backward pass goes through several tiles; the sums over tokens are whole."""
    monkeypatch.setattr(norms_triton, "_PROGRAMS", 3)
    inputs, grads = case((1000, 24), DTYPES["fp32"], True, True)
    assert_as_exact(lambda *tensors: norms.add_layer_norm(*tensors, EPS), plain(True, True), inputs, grads)


def test_a_token_is_blind_to_the_others():
    inputs, _ = case((37, 123), DTYPES["autocast"], False, True)
    together = norms.add_rms_norm(*inputs, EPS, torch.bfloat16)
    x, branch, weight = inputs
    alone = norms.add_rms_norm(x[20:21], branch[20:21], weight, EPS, torch.bfloat16)
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a[20], b[0])


def test_strided_inputs():
    wide, weight = normal(60, 40), normal(20, seed=1)
    found, expected = (norms.rms_norm(x, weight, EPS) for x in (wide[:, ::2], wide[:, ::2].contiguous()))
    assert torch.equal(found, expected)
