"""What a reader of a checkpoint format gives: tensors by name that stay on disk until they are asked for.

A tensor is a list of `Extent`s, places in files where elements lie one after the other. They are read with plain reads
into the tensor's own memory: pages of a memory-mapped file would count as memory of this process.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from enc.encoder import files
from enc.encoder.checkpoints.tensor_file import TensorSpec
from enc.encoder.errors import DamagedError, UsageError
from enc.encoder.files import lfs_advice
from enc.encoder.printable import printable, shown


class Stored(Protocol):
    """A tensor that is read when it is asked for."""

    @property
    def spec(self) -> TensorSpec: ...

    def read(self) -> Tensor: ...


@dataclass(frozen=True)
class Held:
    """A tensor that is in memory already."""

    tensor: Tensor

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec.of(self.tensor)

    def read(self) -> Tensor:
        """Return the tensor, contiguous."""
        return self.tensor.contiguous()


@dataclass(frozen=True)
class Extent:
    """Elements of one dtype that lie one after the other in a file."""

    path: Path
    start: int  # in bytes
    count: int  # in elements

    def read_into(self, flat: Tensor) -> None:
        """Fill a flat CPU tensor of `count` elements. Raises UsageError when the file ends too early."""
        if not self.count:
            return
        view = memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
        done = 0
        try:
            with self.path.open("rb", buffering=0) as file:
                while done < len(view):
                    number = os.preadv(file.fileno(), [view[done : done + 2**26]], self.start + done)
                    if not number:
                        raise damaged(self.path, f"it ends {len(view) - done} bytes too early")
                    done += number
        except OSError as error:
            raise unreadable(self.path, error) from None


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk. Its extents, one after the other, are its elements in row-major order."""

    spec: TensorSpec
    extents: tuple[Extent, ...]
    strides: tuple[int, ...] | None = None  # of a tensor that was saved transposed; then there is one extent

    def read(self) -> Tensor:
        """Return the tensor, on the CPU and contiguous."""
        flat = torch.empty(sum(extent.count for extent in self.extents), dtype=self.spec.dtype)
        done = 0
        for extent in self.extents:
            extent.read_into(flat[done : done + extent.count])
            done += extent.count
        if self.strides is not None:
            return flat.as_strided(self.spec.shape, self.strides).contiguous()
        return flat.view(self.spec.shape)


@dataclass(frozen=True)
class TiledTensor:
    """A tensor that several ranks saved in parts, each a box of it."""

    spec: TensorSpec
    tiles: tuple[tuple[tuple[int, ...], Callable[[], Tensor]], ...]  # (first index, reads the box)

    def read(self) -> Tensor:
        """Return the tensor, on the CPU and contiguous."""
        if len(self.tiles) == 1:
            return self.tiles[0][1]()
        whole = torch.empty(self.spec.shape, dtype=self.spec.dtype)
        for offsets, read in self.tiles:
            box = read()
            whole[tuple(slice(o, o + n) for o, n in zip(offsets, box.shape, strict=True))] = box
        return whole


@dataclass(frozen=True)
class Source:
    """The tensors of one checkpoint of any format.

    `weights` are by parameter name; `moments`, what an optimizer keeps beside them, by `<kind>.<parameter>`. An
    optimizer file that numbers its parameters gives `#0`, `#1`, … in place of names, in the order of its groups.
    """

    path: Path
    format: str
    weights: dict[str, Stored]
    moments: dict[str, Stored] = field(default_factory=dict)
    counters: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    files: tuple[Path, ...] = ()  # that hold the tensors
    buffers: frozenset[str] = frozenset()  # weights of which the source says that no optimizer trains them

    @property
    def tensors(self) -> dict[str, Stored]:
        """Weights, then moments."""
        return {**self.weights, **self.moments}

    @property
    def num_bytes(self) -> int:
        return sum(stored.spec.num_bytes for stored in self.tensors.values())


def merged(*groups: dict[str, Stored]) -> dict[str, Stored]:
    """Join tensors of several files. Raises UsageError when two files hold the same name."""
    whole: dict[str, Stored] = {}
    for group in groups:
        twice = whole.keys() & group.keys()
        if twice:
            raise UsageError(
                f"The tensor {shown(min(twice))} is there twice, in two files. Remove the file that is left over."
            )
        whole.update(group)
    return whole


Box = tuple[tuple[int, ...], tuple[int, ...]]  # first index, sizes


def check_covered(name: str, shape: tuple[int, ...], boxes: list[Box], where: Path) -> None:
    """Raise DamagedError unless the boxes of a tensor lie in it, do not overlap and add up to it."""
    for offsets, sizes in boxes:
        if len(offsets) != len(shape) or len(sizes) != len(shape) or not _inside(offsets, sizes, shape):
            raise damaged(where, f"a part of {shown(name)} lies outside of its shape {list(shape)}")
    found = sum(math.prod(sizes) for _, sizes in boxes)
    if found < math.prod(shape):
        raise DamagedError(
            f"{where} is incomplete: of {shown(name)}, {math.prod(shape)} elements, it holds {found}. A rank's file is "
            "missing; copy the folder again."
        )
    if _overlap([box for box in boxes if math.prod(box[1])], len(shape)):
        raise damaged(where, f"parts of {shown(name)} overlap")


def _inside(offsets: tuple[int, ...], sizes: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return all(o >= 0 and n >= 0 and o + n <= whole for o, n, whole in zip(offsets, sizes, shape, strict=True))


def _overlap(boxes: list[Box], num_dims: int) -> bool:
    """Tell whether two boxes share an element; only those that meet along the dimension cut most often are compared."""
    if not num_dims or len(boxes) < 2:
        return len(boxes) > 1
    most = max(range(num_dims), key=lambda dim: len({offsets[dim] for offsets, _ in boxes}))
    ordered = sorted(boxes, key=lambda box: box[0][most])
    for number, (offsets, sizes) in enumerate(ordered):
        for others, other_sizes in ordered[number + 1 :]:
            if others[most] >= offsets[most] + sizes[most]:
                break
            if all(a < b + m and b < a + n for a, n, b, m in zip(offsets, sizes, others, other_sizes, strict=True)):
                return True
    return False


def damaged(path: Path, why: str) -> DamagedError:
    if advice := lfs_advice(path):
        return DamagedError(advice)
    why = printable(" ".join(why.split()), 400)
    return DamagedError(f"{path} is damaged or was cut short: {why}. Copy it again, or use an older checkpoint.")


def unreadable(path: Path, error: OSError) -> UsageError:
    return UsageError(f"{path} cannot be read ({error.strerror}). Mend the cause, or copy the checkpoint again.")


def is_file_name(name: str) -> bool:
    """Tell whether a name of a stranger is that of something in a folder and leads nowhere else."""
    return name not in ("", ".", "..") and Path(name).name == name and "\0" not in name


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises UsageError when it is not one."""
    try:
        return files.read_json(path)
    except OSError as error:
        raise unreadable(path, error) from None
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"it is not JSON ({error})") from None


def numbers_in(path: Path, names: dict[str, str]) -> dict[str, int | float]:
    """Return the numbers that a JSON file has under some names, by new ones. Raises DamagedError for anything else."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise damaged(path, "it holds no counters")
    known = {name: found[name] for name in names if found.get(name) is not None}
    for name, value in known.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise damaged(path, f"its {name} is {value!r}, not a number")
    return {names[name]: value for name, value in known.items()}
