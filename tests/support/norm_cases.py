"""Cases of the tests of the norms: inputs in every mix of dtypes, the fused operation and its definition."""

import torch
from elementwise import EPS, normal

from enc.kernels import norms

DTYPES = {
    "fp32": (torch.float32, torch.float32, None),
    "bf16": (torch.bfloat16, torch.bfloat16, None),
    "autocast": (torch.float32, torch.bfloat16, torch.bfloat16),
    "fp64": (torch.float64, torch.float64, None),
}


def fused(centered: bool, with_branch: bool, dtype: torch.dtype | None = None):
    """Return the public function as one of (x, [branch,] weight, [bias])."""
    names = {(0, 0): "rms_norm", (1, 0): "layer_norm", (0, 1): "add_rms_norm", (1, 1): "add_layer_norm"}
    function = getattr(norms, names[centered, with_branch])
    return lambda *tensors: function(*tensors, EPS, dtype)


def plain(centered: bool, with_branch: bool, dtype: torch.dtype | None = None):
    """Return the definition with the same arguments; fp64 stays fp64."""

    def function(x, *rest):
        branch, weight, bias = rest[0] if with_branch else None, rest[with_branch], rest[-1] if centered else None
        y_dtype = None if x.dtype == torch.float64 else dtype
        total, y = norms.reference(x, weight, EPS, y_dtype, branch=branch, bias=bias)
        return (total, y) if with_branch else y

    return function


def case(shape, dtypes, centered: bool, with_branch: bool):
    x_dtype, branch_dtype, _ = dtypes
    weight_dtype = torch.promote_types(torch.float32, x_dtype)
    inputs = [normal(*shape, dtype=x_dtype)]
    inputs += [normal(*shape, dtype=branch_dtype, seed=1)] * with_branch
    inputs += [1 + 0.3 * normal(shape[-1], dtype=weight_dtype, seed=2)]
    inputs += [normal(shape[-1], dtype=weight_dtype, seed=3)] * centered
    return inputs, [normal(*shape, seed=4 + i) for i in range(1 + with_branch)]
