"""Checkpoints of other systems, made by these systems themselves, once a session."""

import os
import pickle
import sys
import tempfile
from pathlib import Path

import processes
import torch
from places import GOLDEN

from enc.launcher.machine.ports import free_port

WRITER = Path(__file__).with_name("foreign_writer.py")
ACCELERATE = GOLDEN / "neobert-accelerate"
CASES = ("z0-fp32", "z1-fp32", "z2-fp32", "z3-fp32", "z1-bf16", "z2-bf16", "z3-bf16", "z1-bf16-fp32grads")


def run_writer(*words: str) -> None:
    """Run the writer on 2 ranks and fail with their output when one fails."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
             "DS_ACCELERATOR": "cpu"}  # fmt: skip
    command = [sys.executable, str(WRITER), *words]
    with tempfile.TemporaryFile("w+") as output:
        ranks = [
            processes.start(command, Path.cwd(), processes.quiet_environment() | place | named, output, output)
            for named in ({"RANK": "0", "LOCAL_RANK": "0"}, {"RANK": "1", "LOCAL_RANK": "1"})
        ]
        codes = [process.wait(timeout=300) for process in ranks]
        output.seek(0)
        assert codes == [0, 0], output.read()[-6000:]


class RunsCode:
    """A pickle of this makes a folder when it is loaded by an unpickler that allows everything."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def hostile_torch_file(path: Path, marker: Path) -> None:
    """Write a file of torch.save that makes the folder `marker` when it is unpickled without care."""
    torch.save({"module": {"w": torch.ones(2)}, "extra": RunsCode(marker)}, path)


def hostile_pickle(path: Path, marker: Path) -> None:
    """Write a plain pickle that does the same."""
    path.write_bytes(pickle.dumps(RunsCode(marker)))
