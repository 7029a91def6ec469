"""Weights of any checkpoint as safetensors, one file or shards with an index, one tensor in memory at a time."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from enc.encoder import progress
from enc.encoder.checkpoints.tensor_file import DTYPES as FILE_DTYPES
from enc.encoder.checkpoints.tensor_file import TensorSpec, file_order, write_tensors
from enc.encoder.errors import UsageError
from enc.encoder.printable import shown
from enc.tools.output import new_output
from enc.tools.readers.source import Stored

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Written:
    """What was written where."""

    path: Path
    num_tensors: int
    num_bytes: int
    num_files: int
    left_out: tuple[str, ...] = ()  # tensors of the source that the format has no place for


def consolidate(weights: dict[str, Stored], out: Path, dtype: str | None, max_shard_size: str) -> Written:
    """Write weights to `out`, a file when it is named .safetensors, else a folder with an index where one is needed.

    `dtype` is "fp32", "bf16" or None to keep each tensor's own; whole numbers keep theirs. Raises UsageError when `out`
    is taken, or for another dtype or size.
    """
    specs = output_specs(weights, dtype)
    refuse_unwritable(specs)
    total = sum(spec.num_bytes for spec in specs.values())
    if out.suffix == ".safetensors":
        with new_output(out, total, folder=False) as partial:
            write_file(partial, weights, specs)
        return Written(out, len(specs), total, 1)
    shards = cut_into_shards(specs, parse_size(max_shard_size))
    with new_output(out, total) as partial:
        names = write_shards(partial, weights, shards, total)
    return Written(out, len(specs), total, len(names))


def output_specs(tensors: dict[str, Stored], dtype: str | None) -> dict[str, TensorSpec]:
    """Return what each tensor will be. Raises UsageError for a dtype that is not offered."""
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"--dtype is {dtype!r}; allowed: {', '.join(DTYPES)}.")
    return {name: _output_spec(stored.spec, dtype) for name, stored in tensors.items()}


def refuse_unwritable(specs: dict[str, TensorSpec]) -> None:
    """Raise UsageError for a name or a dtype that a safetensors file cannot hold."""
    for name, spec in specs.items():
        if spec.dtype not in FILE_DTYPES.values():
            raise UsageError(
                f"{shown(name)} is {str(spec.dtype).removeprefix('torch.')}, which safetensors cannot hold. Cast it to "
                "one of its dtypes and save the checkpoint again."
            )
        if name == "__metadata__" or any("\ud800" <= c <= "\udfff" for c in name):
            raise UsageError(
                f"A tensor is named '{shown(name)}', which safetensors cannot hold. Rename it and save it again."
            )


def _output_spec(spec: TensorSpec, dtype: str | None) -> TensorSpec:
    return TensorSpec(DTYPES[dtype], spec.shape) if dtype and spec.dtype.is_floating_point else spec


def parse_size(text: str) -> int:
    """Return the bytes that `5GB`, `500MB` or `2GiB` mean. Raises UsageError for anything else."""
    unit = text.lstrip("0123456789.")
    try:
        size = int(float(text.removesuffix(unit)) * _UNITS[unit.strip().upper() or "B"])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size <= 0:
        raise UsageError(f"--max-shard-size is {shown(repr(text))}, must be a size such as 5GB or 500MB.")
    return size


def cut_into_shards(specs: dict[str, TensorSpec], limit: int) -> list[dict[str, TensorSpec]]:
    """Fill shards up to `limit` bytes in the order of the names; a larger tensor gets a shard of its own."""
    shards: list[dict[str, TensorSpec]] = [{}]
    room = limit
    for name in specs:
        if shards[-1] and specs[name].num_bytes > room:
            shards.append({})
            room = limit
        shards[-1][name] = specs[name]
        room -= specs[name].num_bytes
    return shards


def write_shards(
    folder: Path, tensors: dict[str, Stored], shards: list[dict[str, TensorSpec]], num_bytes: int
) -> list[str]:
    """Write shards under the names of Hugging Face and return the names; more than one get an index."""
    if len(shards) == 1:
        write_file(folder / "model.safetensors", tensors, shards[0])
        return ["model.safetensors"]
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for name, specs in zip(names, shards, strict=True):
        write_file(folder / name, tensors, specs)
    place = {tensor: name for name, specs in zip(names, shards, strict=True) for tensor in specs}
    index = {"metadata": {"total_size": num_bytes}, "weight_map": place}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return names


def write_file(path: Path, tensors: dict[str, Stored], specs: dict[str, TensorSpec]) -> None:
    """Write one safetensors file, reading each tensor when its turn comes."""
    write_tensors(path, specs, _read_all(tensors, specs))


def _read_all(tensors: dict[str, Stored], specs: dict[str, TensorSpec]) -> Iterator[Tensor]:
    with progress.shown("Writing tensors") as show:
        for number, name in enumerate(file_order(specs)):
            show(number, len(specs))
            yield tensors[name].read().to(specs[name].dtype)
