"""Checking a checkpoint of a foreign format as far as the format allows."""

from pathlib import Path

from enc.encoder.checkpoints.folder import CheckpointStatus
from enc.encoder.errors import DamagedError
from enc.tools.readers.detect import open_source
from enc.tools.readers.torch_file import bad_records

_ZIP = b"PK\x03\x04"


def verify_foreign(path: Path) -> tuple[CheckpointStatus, list[str]]:
    """Read a checkpoint to its end; return its state and what was checked.

    Files of torch.save carry a CRC32 of every tensor: all of them compared makes it *complete*. Where a file carries
    none, contents cannot be verified: *unverifiable*. What is missing, cut short or contradicts itself is *damaged*.
    Raises UsageError when it is no checkpoint or must not be read.
    """
    try:
        return _verified(path)
    except DamagedError as error:
        return CheckpointStatus(path, "damaged", [str(error)]), []


def _verified(path: Path) -> tuple[CheckpointStatus, list[str]]:
    source = open_source(path)
    for stored in source.tensors.values():
        stored.read()
    checked = [f"{source.format}: all shards are there, {len(source.tensors)} tensors were read in full"]
    sealed = [file for file in source.files if _is_zip(file)]
    bad = {file.name: problem for file in sealed if (problem := bad_records(file))}
    problems = [f"{name}: {problem}" for name, problem in bad.items()]
    if sealed:
        checked.append(f"{len(sealed)} files compared with the CRC32 in them")
    rest = len(source.files) - len(sealed)
    if rest:
        checked.append(f"{rest} files carry no checksum: contents cannot be verified")
    state = "damaged" if problems else "unverifiable" if rest else "complete"
    return CheckpointStatus(path, state, problems, sum(file.stat().st_size for file in source.files)), checked


def _is_zip(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(4) == _ZIP and file.suffix != ".distcp"
