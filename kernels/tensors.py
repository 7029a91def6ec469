"""What several kernels ask of a tensor."""

import torch
from torch import Tensor


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to calculate and to sum in: fp32 for 16 bits, else the dtype itself."""
    return torch.promote_types(dtype, torch.float32)


def unit_last_stride(x: Tensor) -> Tensor:
    """Return x with neighbours of the last axis side by side in memory; a copy if they are not."""
    return x if x.stride(-1) == 1 else x.contiguous()
