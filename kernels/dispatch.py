"""What may run: the chip, the packages that are installed, and what the run allows."""

import importlib
import importlib.util
from dataclasses import dataclass
from functools import cache

import torch

_TRITON_DTYPES = torch.float32, torch.bfloat16, torch.float16
_OLDEST = (8, 0)  # A100: bf16 and asynchronous copies


@dataclass
class Allowed:
    """What a run allows its process to use; set before the model is built."""

    flash_attn: bool = True  # the package, where it is installed
    triton: bool = True


allowed = Allowed()


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a CUDA device, (8, 0) for an A100."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else _OLDEST


@cache
def import_problem(package: str) -> str | None:
    """Say why a package cannot be imported; None if it can."""
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    try:
        importlib.import_module(package)
    except Exception as problem:  # a build for another torch or CUDA fails in many ways
        return f"{package} cannot be imported ({type(problem).__name__}: {problem})"
    return None


def why_not_triton(device: str, dtype: torch.dtype) -> str | None:
    """Say why no Triton kernel runs on this device in this dtype; None if they do."""
    if device != "cuda":
        return f"there are no fused kernels for the {device.upper()}"
    if not allowed.triton:
        return "model.kernel_backend is torch"
    if dtype not in _TRITON_DTYPES:
        return f"there are no fused kernels in {dtype}"
    if torch.cuda.is_available() and capability(torch.device("cuda")) < _OLDEST:
        return "the GPU is older than an A100"
    return import_problem("triton")
