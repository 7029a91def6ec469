"""Cases of the norm, rope and gate tests, on any device, and the measure of their errors."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

EPS = 1e-5
# Triton's interpreter cuts fp32 off to bf16 instead of rounding it: up to 2^-7 of a number, 2^-8 in the norm.
INTERPRETER_EXTRA = {torch.float32: 1e-6, torch.bfloat16: 2**-8}
Results = list[Tensor | None]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def outputs_and_gradients(function: Callable, inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> Results:
    """Return what a function of tensors gives, and the gradient of each input."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    found = function(*leaves)
    outputs = [found] if isinstance(found, Tensor) else list(found)
    casted = [grad.to(out.dtype) for grad, out in zip(grads, outputs, strict=True)]
    return [*outputs, *torch.autograd.grad(outputs, leaves, casted)]


def assert_as_exact(
    ours: Callable, plain: Callable, inputs: Sequence[Tensor], grads: Sequence[Tensor], extra: float = 1e-6
) -> None:
    """Compare each output and gradient with fp64: an error like that of plain operations, and this much more."""
    wide = [[x.double() for x in tensors] for tensors in (inputs, grads)]
    exact = outputs_and_gradients(plain, *wide)
    found, expected = (outputs_and_gradients(function, inputs, grads) for function in (ours, plain))
    for index, (a, b, truth) in enumerate(zip(found, expected, exact, strict=True)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert error(a, truth) <= 1.05 * error(b, truth) + extra, f"result {index}"


def error(found: Tensor, exact: Tensor) -> float:
    """Return the norm of the difference, relative to the norm of what is exact."""
    if not exact.numel():
        return 0.0
    return ((found.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()
