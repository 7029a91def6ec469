"""Folders of torch.distributed.checkpoint: `.metadata` says which box of which tensor lies where in the data files.

`.metadata` is a pickle. It is read by an unpickler that knows the classes of torch.distributed.checkpoint's metadata
and refuses everything else.
"""

import math
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo

from enc.encoder.checkpoints.tensor_file import TensorSpec
from enc.encoder.errors import DamagedError, UsageError
from enc.encoder.printable import shown
from enc.tools.readers.names import split_names
from enc.tools.readers.source import Source, Stored, TiledTensor, check_covered, damaged, merged
from enc.tools.readers.torch_file import load_pickle_at, stored

_CLASSES = (
    "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
    "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
)  # fmt: skip
_ALLOWED: dict[tuple[str, str], Any] = {
    **{("torch.distributed.checkpoint.metadata", name): getattr(dcp_metadata, name) for name in _CLASSES},
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("collections", "OrderedDict"): dict,
    # The folder that was written to is in it, as a path of one of these classes.
    ("pathlib", "PosixPath"): lambda *parts: "/".join(map(str, parts)),
    ("pathlib", "WindowsPath"): lambda *parts: "/".join(map(str, parts)),
}


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the classes of DCP's metadata and torch's dtypes, nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


def read_metadata(path: Path) -> dcp_metadata.Metadata:
    """Return DCP's metadata. Raises UsageError when the file is damaged or asks for any other class."""
    try:
        with path.open("rb") as file:
            found = _MetadataUnpickler(file).load()
    except pickle.UnpicklingError as error:
        if "." not in str(error):
            raise damaged(path, str(error)) from None
        raise UsageError(
            f"{path} holds a pickle that asks for more than DCP's metadata ({error}), which can run any code. It was "
            "refused and nothing of it was run. Use a checkpoint from a source you trust."
        ) from None
    except Exception as error:  # what a broken pickle raises depends on where it is broken
        raise damaged(path, f"{type(error).__name__}: {error}") from None
    if not isinstance(found, dcp_metadata.Metadata):
        raise damaged(path, "it is not the metadata of a DCP checkpoint")
    return found


def read(path: Path, folders: list[Path]) -> Source:
    """Read DCP folders as one source. Raises UsageError when a data file is missing or damaged."""
    tensors: dict[tuple[str, ...], Stored] = {}
    files: set[Path] = set()
    for folder in folders:
        metadata = read_metadata(folder / ".metadata")
        paths = metadata.planner_data if isinstance(metadata.planner_data, dict) else {}
        try:
            found, of_folder = _tensors(folder, metadata)
        except (AttributeError, TypeError, ValueError) as error:
            raise damaged(folder / ".metadata", str(error)) from None
        files |= of_folder
        tensors.update({tuple(map(str, paths.get(name, (name,)))): tensor for name, tensor in found.items()})
    weights, moments, steps = split_names(tensors)
    updates = steps[0].read() if steps else torch.empty(0)
    counters = {"optimizer_steps": int(updates)} if updates.numel() == 1 and updates.isfinite().all() else {}
    return Source(path, "DCP", weights, moments, counters, files=tuple(sorted(files)))


def _tensors(folder: Path, metadata: dcp_metadata.Metadata) -> tuple[dict[str, Stored], set[Path]]:
    infos: dict[str, list[tuple[tuple[int, ...], _StorageInfo]]] = {}
    for index, info in metadata.storage_data.items():
        infos.setdefault(index.fqn, []).append((tuple(index.offset or ()), info))
    files = {folder / info.relative_path for of_name in infos.values() for _, info in of_name}
    _check_files(folder, files)
    found: dict[str, Stored] = {}
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, dcp_metadata.TensorStorageMetadata):
            found[name] = _tensor(folder, name, entry, dict(infos.get(name, [])))
    return merged(found), files


def _check_files(folder: Path, files: set[Path]) -> None:
    if any(file.parent != folder or file.name in ("", "..") for file in files):
        raise UsageError(f"{folder}/.metadata names files outside of its folder. Use a checkpoint that you trust.")
    missing = sorted(file.name for file in files if not file.is_file())
    if missing:
        raise DamagedError(
            f"{folder} is incomplete: {', '.join(missing[:8])} of {len(files)} data files missing. Copy it again, from "
            "all nodes."
        )


def _tensor(
    folder: Path, name: str, entry: dcp_metadata.TensorStorageMetadata, infos: dict[tuple[int, ...], _StorageInfo]
) -> TiledTensor:
    spec = TensorSpec(entry.properties.dtype, tuple(entry.size))
    tiles: list[tuple[tuple[int, ...], Callable[[], Tensor]]] = []
    for chunk in entry.chunks:
        offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
        info = infos.get(offsets)
        if info is None:
            raise damaged(folder / ".metadata", f"it does not say where {shown(name)} from {offsets} on lies")
        if info.transform_descriptors:
            raise UsageError(f"{folder} is compressed, which is not read. Save it again without DCP extensions.")
        tiles.append((offsets, partial(_read_box, folder / info.relative_path, info, TensorSpec(spec.dtype, sizes))))
    check_covered(name, spec.shape, [(tuple(c.offsets), tuple(c.sizes)) for c in entry.chunks], folder)
    return TiledTensor(spec, tuple(tiles))


def _read_box(file: Path, info: _StorageInfo, spec: TensorSpec) -> Tensor:
    if info.offset + info.length > file.stat().st_size:
        raise damaged(file, f"it has {file.stat().st_size} bytes, a tensor ends at {info.offset + info.length}")
    found = load_pickle_at(file, info.offset, info.length)
    if not isinstance(found, Tensor) or found.dtype != spec.dtype or found.numel() != math.prod(spec.shape):
        raise damaged(file, "it holds another tensor than .metadata says")
    return stored(file, found, info.offset).read().view(spec.shape)
