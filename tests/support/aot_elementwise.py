"""What ``tests/support/aot.py`` compiles of norms, rope and the gate: each kernel at usual sizes and dtypes."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from enc.kernels import norms_triton, rope_triton, swiglu_triton

TOKENS = 65_536
SIZES = (384, 768, 1024, 2048, 4096)
DTYPES = {"bf16": (torch.bfloat16,) * 3, "autocast": (torch.float32, torch.bfloat16, torch.bfloat16)}


def launches(device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the name of each case and what launches its kernels on tensors of the device."""
    for size in SIZES:
        for name, dtypes in DTYPES.items():
            for centered in (False, True):
                for branch in (False, True):
                    words = f"{'layer' if centered else 'rms'} norm {size} {name}{' branch' * branch}"
                    yield words, _norm(device, size, *dtypes, centered, branch)
    for dtype in (torch.bfloat16, torch.float32):
        for dim in (32, 64, 96, 128):
            yield f"rope {dim} {dtype}", _rope(device, dim, dtype)
        yield f"swiglu {dtype}", _gate(device, dtype)


def _norm(
    device: torch.device,
    size: int,
    x_dtype: torch.dtype,
    branch_dtype: torch.dtype,
    y_dtype: torch.dtype,
    centered: bool,
    with_branch: bool,
) -> Callable[[], object]:
    def launch() -> object:
        x = torch.empty(TOKENS, size, dtype=x_dtype, device=device)
        branch = torch.empty_like(x, dtype=branch_dtype) if with_branch else None
        weight = torch.empty(size, device=device)
        bias = weight if centered else None
        total, y, mean, inverse = norms_triton.forward(x, branch, weight, bias, 1e-5, y_dtype)
        outer = total if with_branch else None
        branch_grad = branch_dtype if with_branch else None
        return norms_triton.backward(outer, y, total, weight, mean, inverse, x_dtype, branch_grad)

    return launch


def _rope(device: torch.device, dim: int, dtype: torch.dtype) -> Callable[[], object]:
    def launch() -> Tensor:
        qkv = torch.empty(TOKENS, 12, 3, dim, dtype=dtype, device=device)
        cos_sin = torch.empty(TOKENS, dim // 2, 2, device=device)
        qk = rope_triton.rotate(qkv[:, :, :2], cos_sin, torch.empty_like(qkv[:, :, :2]), back=False)
        return rope_triton.rotate(qk[:, :, 0], cos_sin, qkv[:, :, 0], back=True)

    return launch


def _gate(device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    def launch() -> object:
        a = torch.empty(TOKENS, 2048, dtype=dtype, device=device)
        return swiglu_triton.backward(swiglu_triton.forward(a, a), a, a)

    return launch
