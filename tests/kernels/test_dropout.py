"""Dropout: rates, expectation, gradients and draws."""

import pytest
import torch
import torch.nn.functional as F

from enc.kernels.dropout import dropout, keep_mask, reference, scale


@pytest.mark.parametrize("p", [0.1, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [37, 30011])
def test_values_and_gradient(p: float, dtype: torch.dtype, shape: int) -> None:
    """What is kept is scaled, what is dropped is 0, in the result and in the gradient."""
    x = torch.randn(11, shape, dtype=dtype).T.requires_grad_()
    torch.manual_seed(1)
    y = dropout(x, p)
    torch.manual_seed(1)
    seed = int(torch.randint(2**62, (1,)))
    assert y.dtype == dtype
    torch.testing.assert_close(y, reference(x, p, seed))
    grad = torch.randn_like(x)
    y.backward(grad)
    torch.testing.assert_close(x.grad, reference(grad, p, seed))


@pytest.mark.parametrize("p", [0.0, 0.01, 0.1, 0.3])
def test_rate_and_expectation(p: float) -> None:
    """The share that is dropped is p, within five standard deviations, and the expectation stays."""
    count = 2_000_000
    dropped = 1 - keep_mask(torch.Size([count]), p).double().mean().item()
    assert abs(dropped - p) < 5 * (max(p, 1e-9) / count) ** 0.5 + 8e-6
    assert scale(p) * (1 - round(p * 2**16) / 2**16) == pytest.approx(1, abs=1e-12)


def test_neighbours_are_independent() -> None:
    """The four draws of a random word are not alike: lags of 1 to 8 have no correlation."""
    dropped = (~keep_mask(torch.Size([1_000_000]), 0.5)).double() - 0.5
    for lag in range(1, 9):
        assert abs((dropped[:-lag] * dropped[lag:]).mean().item() / 0.25) < 5e-3


def test_draws_follow_the_global_generator() -> None:
    """The same seed drops the same elements, another one others; nothing is drawn that is not needed."""
    x = torch.ones(1000)
    torch.manual_seed(3)
    first, second = dropout(x, 0.5), dropout(x, 0.5)
    torch.manual_seed(3)
    assert torch.equal(dropout(x, 0.5), first)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    assert dropout(x, 0.0) is x
    assert dropout(x, 0.5, training=False) is x
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 0, 2), (5,), (3, 1, 7), (2**17 - 1,), (2, 2**16 + 1)])
def test_odd_shapes(shape: tuple[int, ...]) -> None:
    """Whatever the shape, element i has the draw that it has in any other tensor, and its gradient the same."""

    def dropped(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return dropout(x, 0.5)

    x = torch.ones(shape, requires_grad=True)
    y = dropped(x)
    assert y.shape == shape
    assert torch.equal(y.flatten(), dropped(torch.ones(x.numel() + 9))[: x.numel()])
    assert set(y.unique().tolist()) <= {0.0, 2.0}
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y)  # x is 1


def test_compiled_is_torchs() -> None:
    """Under torch.compile the operation is PyTorch's own, which the compiler knows."""
    x = torch.ones(1000)
    compiled = torch.compile(lambda t: dropout(t, 0.5), backend="eager", fullgraph=True)
    torch.manual_seed(0)
    found = compiled(x)
    torch.manual_seed(0)
    assert torch.equal(found, F.dropout(x, 0.5))
