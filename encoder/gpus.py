"""Data sheets: memory and peak rates of the GPUs that `enc plan` and the MFU know (no torch).

Memory is what CUDA reports, a little less than the name says. Rates are dense, in FLOP/s: bf16 tensor cores and TF32.
"""

from dataclasses import dataclass

from enc.encoder.errors import UsageError
from enc.encoder.spelling import did_you_mean


@dataclass(frozen=True)
class Gpu:
    """One model of GPU; `part` is what CUDA's name of the device contains."""

    name: str
    part: str
    gib: float
    bf16_flops: float
    tf32_flops: float

    @property
    def bytes(self) -> int:
        return int(self.gib * 2**30)

    def peak_flops(self, bf16: bool) -> float:
        return self.bf16_flops if bf16 else self.tf32_flops


# A part that contains another one stands before it: the first match counts.
GPUS = [
    Gpu("h100-pcie-80gb", "H100 PCIe", 79.1, 756e12, 378e12),
    Gpu("h100-80gb", "H100", 79.1, 989e12, 494e12),
    Gpu("h200-141gb", "H200", 139.8, 989e12, 494e12),
    Gpu("b200-180gb", "B200", 178.4, 2250e12, 1125e12),
    Gpu("a100-80gb", "A100", 79.1, 312e12, 156e12),
    Gpu("a100-40gb", "A100", 39.4, 312e12, 156e12),
    Gpu("l40s-48gb", "L40S", 44.4, 362e12, 183e12),
    Gpu("l4-24gb", "L4", 22.0, 121e12, 60e12),
    Gpu("a10-24gb", "A10", 22.1, 125e12, 62.5e12),
    Gpu("rtx4090-24gb", "RTX 4090", 23.5, 165e12, 82.6e12),
    Gpu("rtx5090-32gb", "RTX 5090", 31.4, 209e12, 104.8e12),
]


def find_gpu(name: str) -> Gpu:
    """Return the GPU of a name like `h100-80gb`. Raises UsageError that lists the names."""
    names = sorted(gpu.name for gpu in GPUS)
    for gpu in GPUS:
        if gpu.name == name.lower():
            return gpu
    hint = did_you_mean(name.lower(), names) or "."
    raise UsageError(f"--gpu {name} is not known{hint} Known are: {', '.join(names)}.")


def gpu_of_device(cuda_name: str) -> Gpu | None:
    """Return the data sheet of a device by the name that CUDA gives it, or None."""
    return next((gpu for gpu in GPUS if gpu.part in cuda_name), None)
