"""Streamed safetensors files are those of the safetensors library."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from enc.encoder.checkpoints.tensor_file import DTYPES, TensorSpec, file_order, write_tensors
from enc.encoder.files import file_checksum


def test_bytes_and_checksum_are_the_librarys(tmp_path: Path) -> None:
    """Many dtypes, empty tensors, scalars, names that are not ASCII: the same bytes as save_file writes."""
    dtypes = list(DTYPES.values())
    tensors = {f"t{n}": torch.randn(n % 5, 3).to(dtypes[n % len(dtypes)]) for n in range(40)}
    tensors |= {"scalar": torch.tensor(3.0), "naïve.weight": torch.randn(4, 4).T, "tab\t": torch.ones(1)}
    specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
    checksum = write_tensors(tmp_path / "ours", specs, (tensors[name] for name in file_order(specs)))
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert checksum == file_checksum(tmp_path / "ours")


def test_a_tensor_that_was_not_announced_is_refused(tmp_path: Path) -> None:
    specs = {"a": TensorSpec(torch.float32, (2, 3))}
    for tensors in ([torch.ones(3, 2)], [torch.ones(2, 3, dtype=torch.float64)], [], [torch.ones(2, 3)] * 2):
        with pytest.raises(ValueError, match=r"announced|shorter|longer"):
            write_tensors(tmp_path / "file", specs, tensors)
