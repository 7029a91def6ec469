"""Safetensors files written one tensor at a time, checksummed on the way.

The safetensors library writes a file from tensors that are all in memory and leaves its checksum to a second reading.
The format is simple enough to stream: 8 bytes length of the header, the header (JSON: dtype, shape and place of each
tensor, padded with spaces to a multiple of 8), then the tensors' bytes. The bytes are those that the library writes.
"""

import json
import math
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

# In the order in which the library lays tensors out.
DTYPES = {
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "C64": torch.complex64, "F32": torch.float32,
    "U32": torch.uint32, "I32": torch.int32, "BF16": torch.bfloat16, "F16": torch.float16, "U16": torch.uint16,
    "I16": torch.int16, "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E8M0": torch.float8_e8m0fnu, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(_CODES)}


@dataclass(frozen=True)
class TensorSpec:
    """Type and shape of a tensor that need not be in memory."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorSpec":
        return cls(tensor.dtype, tuple(tensor.shape))


def file_order(specs: dict[str, TensorSpec]) -> list[str]:
    """Return tensor names in the order of a safetensors file: by dtype, then by name."""
    return sorted(specs, key=lambda name: (_RANKS[specs[name].dtype], name))


def write_tensors(path: Path, specs: dict[str, TensorSpec], tensors: Iterable[Tensor]) -> str:
    """Write a safetensors file, flush it to disk and return its xxh3_64.

    Args:
        path: File to write; an older one is replaced.
        specs: Type and shape of each tensor by name.
        tensors: The tensors on the CPU, in the order of ``file_order(specs)``; each is asked for when its turn comes.

    Raises:
        ValueError: A tensor is not what its spec says, or there are too few or too many.
    """
    digest = xxhash.xxh3_64()
    with path.open("wb") as file:
        header = _header(specs)
        file.write(header)
        digest.update(header)
        remaining = iter(tensors)
        for name in file_order(specs):
            tensor = next(remaining, None)
            if tensor is None:
                raise ValueError(f"{name} was announced, but is not there")
            if TensorSpec.of(tensor) != specs[name]:
                raise ValueError(f"{name} is {TensorSpec.of(tensor)}, but was announced as {specs[name]}")
            data: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            file.write(data)
            digest.update(data)
            del tensor, data  # before the next one is made: never two in memory
        if next(remaining, None) is not None:
            raise ValueError(f"more than the {len(specs)} announced tensors were given")
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _header(specs: dict[str, TensorSpec]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in file_order(specs):
        spec = specs[name]
        end = start + spec.num_bytes
        header[name] = {"dtype": _CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
