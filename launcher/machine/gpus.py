"""The GPUs of this machine, looked at without starting CUDA."""

import csv
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from enc.encoder.errors import UsageError

_FIELDS = "index,name,driver_version,memory.total,memory.used,compute_cap"


@dataclass(frozen=True)
class InstalledGpu:
    """A line of nvidia-smi; memory in MiB."""

    index: str
    name: str
    driver: str
    total: int
    used: int
    capability: str


def count_gpus(environment: Mapping[str, str]) -> int:
    """Count the NVIDIA GPUs that a process with this environment may use."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([word for word in visible.split(",") if word.strip() not in ("", "-1")])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def ask_nvidia_smi(timeout_s: float) -> list[InstalledGpu]:
    """Return the GPUs that nvidia-smi lists; none where it is not installed. Raises UsageError with what it said."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise UsageError(f"nvidia-smi did not answer within {timeout_s:g} s: a GPU or the driver hangs") from None
    if done.returncode:
        raise UsageError(f"nvidia-smi failed: {' '.join((done.stdout + done.stderr).split())}")
    return [gpu for row in csv.reader(done.stdout.splitlines(), skipinitialspace=True) if (gpu := _gpu_of(row))]


def _gpu_of(row: list[str]) -> InstalledGpu | None:
    try:
        index, name, driver, total, used, capability = row
        return InstalledGpu(index, name, driver, int(total), int(used), capability)
    except ValueError:
        return None
