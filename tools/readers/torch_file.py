"""Files of torch.save: the pickle is read by torch's weights-only unpickler, the tensors' bytes stay on disk.

Loaded to the meta device, a storage has no memory and knows its place in the file (`_checkpoint_offset`).
FakeTensorMode would give the same, but imports the whole compiler: a second, and 100 MB of memory.

DeepSpeed pickles objects of three classes of its own beside its tensors. Each is replaced by a stand-in below, which
holds what was pickled and does nothing, so DeepSpeed is neither imported nor run.
"""

import io
import math
import os
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.serialization import safe_globals

from enc.encoder.checkpoints.tensor_file import TensorSpec
from enc.encoder.errors import UsageError
from enc.encoder.optim.state_spec import KINDS
from enc.encoder.printable import printable, shown
from enc.tools.readers.source import Extent, Held, Stored, StoredTensor, damaged, unreadable


class _Record:
    """Stands for an object of which only its pickled fields are of interest."""


class _Stage(int):
    """Stands for deepspeed.runtime.zero.config.ZeroStageEnum."""


_STAND_INS: list[Any] = [
    (_Stage, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_Record, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Record, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Record, "deepspeed.utils.tensor_fragment.fragment_address"),
]


def load_pickle(path: Path) -> Any:
    """Return what a file of torch.save holds, with tensors that have a shape and a place on disk but no values.

    Raises UsageError when the file is damaged, or when its pickle asks for anything but tensors and plain values.
    """
    with _opened(path) as file:
        return _load(path, file)


def load_trusted(path: Path) -> Any:
    """Return what a file of torch.save holds, values included, running whatever its pickle asks for.

    For files of which a person said that they trust them. Raises UsageError when it cannot be loaded.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except OSError as error:
        raise unreadable(path, error) from None
    except ImportError as error:
        raise UsageError(
            f"{path} needs code that is not here ({error}). Install it, or load the file where it was written and save "
            "its tensors alone."
        ) from None
    except Exception as error:  # a pickle can raise anything
        raise damaged(path, str(error).splitlines()[0] if str(error) else type(error).__name__) from None


def load_values(path: Path) -> Any:
    """Return what a small file of torch.save holds, values included. Raises UsageError as `load_pickle` does."""
    load_pickle(path)
    with safe_globals(_STAND_INS):
        return torch.load(path, map_location="cpu", weights_only=True)


def load_pickle_at(path: Path, start: int, length: int) -> Any:
    """Do the same for a torch.save that is a part of a larger file; places are counted from `start`."""
    with _opened(path) as file:
        return _load(path, io.BufferedReader(_Part(file, start, length)))


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise unreadable(path, error) from None


def _load(path: Path, file: Any) -> Any:
    start = file.read(4)
    if not start:
        raise damaged(path, "it is empty")
    if start[0] not in b"P\x80":  # of an archive, of a pickle
        raise damaged(path, "it does not begin like a file of torch.save")
    if start != b"PK\x03\x04":
        raise UsageError(
            f"{path} is not a file of torch.save as torch writes it since 1.6, so nothing of it was read. If you trust "
            "it, load it and save it again with torch, or `enc ckpt import` it with --trust-checkpoint; else remove it."
        )
    _refuse_compressed(path, file)
    file.seek(0)
    try:
        # It warns of pickle protocols; an odd one is damage and fails on its own.
        with safe_globals(_STAND_INS), warnings.catch_warnings(action="ignore", category=UserWarning):
            return torch.load(file, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"{path} holds a pickle that asks for more than tensors and plain values ({_asked_for(error)}), which can "
            "run any code. It was refused and nothing of it was run. Use a checkpoint from a source you trust; if you "
            "trust this file, `enc ckpt import` takes it with --trust-checkpoint."
        ) from None
    except Exception as error:  # what a broken file raises depends on where it is broken
        raise damaged(path, str(error).splitlines()[0] if str(error) else type(error).__name__) from None


def _refuse_compressed(path: Path, file: Any) -> None:
    """Refuse an archive that was packed again with compression: tensors are read from their places, as they lie."""
    try:
        compressed = [i.filename for i in zipfile.ZipFile(file).infolist() if i.compress_type != zipfile.ZIP_STORED]
    except Exception as error:  # as above
        raise damaged(path, str(error) or type(error).__name__) from None
    if compressed:
        raise UsageError(
            f"{path} is compressed ({shown(compressed[0])}), which torch.save never does, so nothing of it was read. "
            "Load it and save it again with torch."
        )


def _asked_for(error: pickle.UnpicklingError) -> str:
    """Return the name of what was refused, from the wordy message of torch."""
    words = str(error).replace(",", " ").replace("`", " ").split()
    for before, name in pairwise(words):
        if before in ("GLOBAL", "global", "call"):
            return name
    return "an unsupported instruction"


class _Part(io.RawIOBase):
    """A part of an open file, as a file of its own."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self.file, self.first, self.length, self.position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence]
        self.position = max(0, base + offset)
        return self.position

    def readinto(self, buffer: Any) -> int:
        number = max(0, min(len(buffer), self.length - self.position))
        self.file.seek(self.first + self.position)
        data = self.file.read(number)
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


# --- places of tensors -----------------------------------------------------------------------------------------------


def stored(path: Path, tensor: Tensor, first: int = 0) -> StoredTensor:
    """Return where a tensor of `load_pickle` lies; `first` is where the torch.save begins in its file."""
    spec = TensorSpec.of(tensor)
    if tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        raise UsageError(
            f"{path} holds a tensor that is quantized or a view (conjugated or negated), which is not read. Save it "
            "again with plain tensors."
        )
    if not tensor.numel():
        return StoredTensor(spec, ())
    if getattr(tensor.untyped_storage(), "_checkpoint_offset", None) is None:
        raise UsageError(
            f"{path} holds a tensor of the meta device, of shape {list(tensor.shape)}, which has no values. Save it "
            "again from a model whose weights are in memory."
        )
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    saved_at: int = tensor.untyped_storage()._checkpoint_offset  # type: ignore[assignment]
    begin = first + saved_at + int(tensor.storage_offset()) * tensor.element_size()
    if begin + span * tensor.element_size() > path.stat().st_size:
        raise damaged(path, "a tensor reaches beyond its end")
    strides = None if tensor.is_contiguous() else tuple(tensor.stride())
    return StoredTensor(spec, (Extent(path, begin, span),), strides)


def _any_stored(path: Path, tensor: Tensor) -> Stored:
    return stored(path, tensor) if tensor.is_meta else Held(tensor.detach())


def flat_part(path: Path, tensor: Tensor, start: int, count: int) -> Extent:
    """Return the place of `count` elements of a flat tensor of `load_pickle`."""
    (extent,) = stored(path, tensor).extents
    return Extent(path, extent.start + start * tensor.element_size(), count)


def state_dict_tensors(path: Path, found: Mapping[str, Any]) -> dict[str, Stored]:
    """Return the tensors of a state dict by their dotted names; other values are left out."""
    try:
        return {name: _any_stored(path, tensor) for name, tensor in _flat(found) if tensor.layout == torch.strided}
    except RecursionError:
        raise damaged(path, "its dictionaries lie too deep in each other") from None


def _flat(found: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(found, Tensor):
        yield prefix, found
    elif isinstance(found, Mapping):
        for key, value in found.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))


def optimizer_moments(path: Path, optimizer: Any) -> tuple[dict[str, Stored], int | None]:
    """Return the numbered moments (`<kind>.#3`) of a torch optimizer's state dict, and its step."""
    state = optimizer.get("state") if isinstance(optimizer, Mapping) else None
    if not isinstance(state, Mapping):
        return {}, None
    moments: dict[str, Stored] = {}
    step = None
    for number, entry in state.items():
        if not isinstance(entry, Mapping):
            continue
        moments.update({f"{kind}.#{number}": _any_stored(path, entry[kind]) for kind in KINDS if kind in entry})
        step = number_of(path, entry.get("step", step))
    return moments, step


def number_of(path: Path, value: Any) -> int | None:
    """Return a step, which is a number or a tensor of one, as a whole number."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = _any_stored(path, value).read().item()
    return int(value) if isinstance(value, int | float) and math.isfinite(value) else None


def bad_records(path: Path) -> str | None:
    """Compare the contents of a torch file with the checksums in it; say what is wrong, None when nothing is."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except Exception as error:  # what a broken archive raises depends on where it is broken
        return f"its records cannot be read ({printable(error)})"
    return f"{shown(bad)} does not match its CRC32" if bad is not None else None
