"""What the tests of rope compare with."""

import torch

from enc.kernels import rope


def real(qkv, cos_sin):
    """Return q, k, v from the definition; fp64 input is rotated in fp64."""
    cos_sin = cos_sin.to(torch.promote_types(qkv.dtype, torch.float32))[:, None, None]
    q, k = rope.reference(qkv[:, :, :2], cos_sin).unbind(2)
    return q, k, qkv[:, :, 2]
