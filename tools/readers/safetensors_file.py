"""Safetensors files, single or sharded: the header is read and checked, the tensors stay on disk."""

import json
import math
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

from enc.encoder.checkpoints.tensor_file import DTYPES, TensorSpec
from enc.encoder.errors import DamagedError, UsageError
from enc.encoder.printable import shown
from enc.tools.readers.source import (
    Extent,
    Stored,
    StoredTensor,
    TiledTensor,
    check_covered,
    damaged,
    is_file_name,
    merged,
    read_json,
    unreadable,
)

_MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors library
_MAX_SIZE = 2**48  # of a dimension; only a tensor of no elements could have a larger one


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Return the tensors of a safetensors file and its metadata. Raises UsageError when it is damaged."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(_MAX_HEADER, size - 8):
                raise damaged(path, "its header is longer than the file")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict):
            raise damaged(path, "its __metadata__ is not a dictionary")
        tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in header.items()}
        _check_layout(path, tensors, 8 + length, size)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(path, f"it has no header of the safetensors format ({error})") from None
    except OSError as error:
        raise unreadable(path, error) from None
    return tensors, metadata


def _tensor(path: Path, name: str, entry: dict[str, Any], first: int) -> StoredTensor:
    name.encode()  # raises ValueError for half of a surrogate pair, which no other reader takes
    if entry["dtype"] not in DTYPES:
        raise UsageError(
            f"{path}: {shown(name)} has dtype {shown(entry['dtype'])}; read are {', '.join(DTYPES)}. Convert it to one "
            "of them with the program that wrote it."
        )
    begin, end = entry["data_offsets"]
    if not all(type(number) is int for number in (begin, end, *entry["shape"])):
        raise damaged(path, f"shape or place of {shown(name)} are not whole numbers")
    spec = TensorSpec(DTYPES[entry["dtype"]], tuple(entry["shape"]))
    if end - begin != spec.num_bytes or min(begin, *spec.shape, 0) < 0 or max(spec.shape, default=0) >= _MAX_SIZE:
        raise damaged(path, f"{shown(name)} has {end - begin} bytes, its shape needs {spec.num_bytes}")
    return StoredTensor(spec, (Extent(path, first + begin, math.prod(spec.shape)),))


def _check_layout(path: Path, tensors: dict[str, StoredTensor], first: int, size: int) -> None:
    places = sorted((t.extents[0].start, t.extents[0].start + t.spec.num_bytes) for t in tensors.values())
    if any(end > start for (_, end), (start, _) in pairwise(places)):
        raise damaged(path, "tensors overlap")
    end = max((end for _, end in places), default=first)
    if end != size:
        raise damaged(path, f"it has {size} bytes, its header says {end}")


def read_file(path: Path) -> dict[str, Stored]:
    """Return the tensors of one file."""
    return dict(read_header(path)[0])


def read_shards(paths: list[Path]) -> dict[str, Stored]:
    """Return the tensors of several files; those that DCP cut into boxes (`DCP_SHARDING_INFO`) are joined again."""
    whole: list[dict[str, Stored]] = []
    boxes: dict[str, list[tuple[tuple[int, ...], StoredTensor]]] = {}
    for path in paths:
        tensors, metadata = read_header(path)
        cut = _sharding_info(path, metadata.get("DCP_SHARDING_INFO", "{}"), tensors)
        whole.append({name: tensor for name, tensor in tensors.items() if name not in cut})
        for name, offsets in cut.items():
            boxes.setdefault(name, []).append((offsets, tensors[name]))
    return merged(*whole, {name: _joined(name, parts) for name, parts in boxes.items()})


def _sharding_info(path: Path, text: Any, tensors: dict[str, StoredTensor]) -> dict[str, tuple[int, ...]]:
    """Return the first index of each tensor that is a box of a larger one."""
    try:
        found = {name: tuple(entry["saved_offsets"]) for name, entry in json.loads(text).items() if name in tensors}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(path, f"its DCP_SHARDING_INFO cannot be read ({error})") from None
    for name, offsets in found.items():
        if len(offsets) != len(tensors[name].spec.shape) or not all(type(o) is int and o >= 0 for o in offsets):
            raise damaged(path, f"its DCP_SHARDING_INFO does not fit {shown(name)}")
    return found


def _joined(name: str, parts: list[tuple[tuple[int, ...], StoredTensor]]) -> Stored:
    if len(parts) == 1 and not any(parts[0][0]):
        return parts[0][1]
    file = parts[0][1].extents[0].path
    if len({(part.spec.dtype, len(part.spec.shape)) for _, part in parts}) > 1:
        raise damaged(file.parent, f"parts of {shown(name)} differ in dtype or dimensions")
    ends = [[o + n for o, n in zip(offsets, part.spec.shape, strict=True)] for offsets, part in parts]
    shape = tuple(max(end) for end in zip(*ends, strict=True))
    check_covered(name, shape, [(offsets, part.spec.shape) for offsets, part in parts], file.parent)
    spec = TensorSpec(parts[0][1].spec.dtype, shape)
    return TiledTensor(spec, tuple((offsets, part.read) for offsets, part in parts))


def indexed_files(index: Path) -> list[Path]:
    """Return the shards that an index of Hugging Face names. Raises UsageError when one is not there."""
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise damaged(index, "it has no weight_map")
    names = sorted(set(weight_map.values()))
    if not all(is_file_name(name) for name in names):
        raise UsageError(f"{index} names files outside of its folder. Use a checkpoint from a source you trust.")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise DamagedError(
            f"{index.parent} is incomplete: {', '.join(missing)} of {len(names)} shards missing. Copy the folder again."
        )
    return [index.parent / name for name in names]
