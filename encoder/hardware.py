"""What a rank runs on: device, arithmetic, peak rate, memory."""

import os
import resource
import time
from dataclasses import dataclass

import torch
from torch.utils import deterministic

from enc.encoder.gpus import gpu_of_device


@dataclass(frozen=True)
class Hardware:
    """The device of this rank and how matrix products are done on it."""

    device: torch.device
    bf16: bool
    peak_flops: float | None  # of a CPU there is none: it depends on what else runs there
    peak_source: str

    @classmethod
    def detect(cls, use_cpu: bool, local_rank: int, bf16: bool, tf32: bool) -> "Hardware":
        """Choose the device of a local rank and set up its arithmetic."""
        _compute_deterministically()
        if use_cpu or not torch.cuda.is_available():
            device = torch.device("cpu")
        else:
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high" if tf32 else "highest")
        peak, source = _peak(device, bf16)
        return cls(device, bf16, peak, source)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of matrix products."""
        return torch.bfloat16 if self.bf16 else torch.float32

    @property
    def name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"CPU, {torch.get_num_threads()} threads"

    def max_memory_mb(self) -> float:
        """Return the peak so far: allocated on the GPU, resident in the process on the CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _compute_deterministically() -> None:
    """Ask for algorithms that give the same bits each time; an operation without one warns and runs all the same.

    Without this, compiled CPU code and several CUDA backward passes add with atomics, in any order.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs time and hides nothing here


def _peak(device: torch.device, bf16: bool) -> tuple[float | None, str]:
    if device.type == "cpu":
        return None, "not known of a CPU"
    name = torch.cuda.get_device_name(device)
    if gpu := gpu_of_device(name):
        return gpu.peak_flops(bf16), f"{name} data sheet"
    return measured_peak(device, bf16), "matrix product measured at start"


def measured_peak(device: torch.device, bf16: bool, size: int = 1024) -> float:
    """Return the best rate of a few square matrix products, for devices without a data sheet."""
    a = torch.ones(size, size, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
