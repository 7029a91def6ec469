"""What the CPU of this machine can do, as far as libraries may use it."""

from collections.abc import Mapping
from pathlib import Path

_UNCAPPED = ("", "ALL", "DEFAULT")


def has_bf16(cpuinfo: str, environment: Mapping[str, str]) -> bool:
    """Tell whether matrix products in bf16 have instructions of their own; a cap on oneDNN's counts as none."""
    cap = environment.get("ONEDNN_MAX_CPU_ISA", "").upper()
    return cap in _UNCAPPED and "avx512_bf16" in cpuinfo.split()


def read_cpuinfo() -> str:
    """Return what the kernel says of the processors, nothing where it does not."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
