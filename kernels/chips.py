"""What a kernel's configuration depends on."""

from functools import cache

import torch


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a CUDA device, (8, 0) for an A100."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
