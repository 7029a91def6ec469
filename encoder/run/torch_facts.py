"""What torch says of itself and of the GPUs, as one line of JSON: `python -m enc.encoder.run.torch_facts`.

A process of its own, so that a broken install, a hanging driver and a crash are answers too.
"""

import json
import sys
import warnings
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from enc.encoder.models import fast_paths
from enc.encoder.models.neobert.config import NeoBertConfig


def describe() -> dict[str, Any]:
    """Return versions, what CUDA says, the devices, and why fast paths are off."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        has_cuda = torch.cuda.is_available()
    device = "cuda" if has_cuda else "cpu"
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cuda_available": has_cuda,
        "cuda_said": " ".join(str(warning.message) for warning in said),
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())] if has_cuda else [],
        "architectures": torch.cuda.get_arch_list(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.version.cuda else None,
        "flash_attn": _import_error("flash_attn"),
        "why_not": fast_paths.why_not(NeoBertConfig(), device, torch.bfloat16),
    }


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": [properties.major, properties.minor],
        "bytes": properties.total_memory,
    }


def _import_error(module: str) -> str | None:
    """Return why an optional module that is installed cannot be imported; None when it can, or is not installed."""
    if find_spec(module) is None:
        return None
    try:
        import_module(module)
    except Exception as error:  # an extension built for another torch raises whatever it likes
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return None


if __name__ == "__main__":
    json.dump(describe(), sys.stdout)
