"""What figures depend on outside of this repository: chip, clocks, versions, date and command line."""

import os
import platform
import shlex
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from enc.encoder.errors import UsageError
from enc.encoder.printable import printable
from enc.encoder.spelling import did_you_mean

_CLOCKS = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "driver_version")


def device_of(name: str | None) -> torch.device:
    """Return the device of a word of the command line; None is the GPU where there is one.

    Raises UsageError for a GPU that is not there, or a word that is no device.
    """
    has_cuda = torch.cuda.is_available()
    if name not in (None, "cpu", "cuda"):
        raise UsageError(f"--device {name} is not known; it is cpu or cuda.")
    if name == "cuda" and not has_cuda:
        why = "sees no GPU" if torch.version.cuda else "was built without CUDA"
        raise UsageError(
            f"--device cuda: torch {torch.__version__} {why}. `enc doctor` says more; or use --device cpu."
        )
    return torch.device("cuda" if has_cuda and name != "cpu" else "cpu")


def refuse_unknown(what: str, words: Iterable[str], known: Iterable[str]) -> None:
    """Raise UsageError for the first word that is not one of the known ones."""
    known = list(known)
    for word in words:
        if word not in known:
            hint = did_you_mean(word, known) or "."
            raise UsageError(f"{what} {printable(word)} is not known{hint} Known are: {', '.join(known)}.")


def machine(device: torch.device, packages: Sequence[str]) -> dict[str, Any]:
    """Return chip, clocks, cores, threads and the versions of those packages that are installed."""
    found = _cpu() | {"cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        found["gpu"] = _gpu(device)
    numbers = {name: number for name in packages if (number := installed_version(name))}
    return found | {
        "versions": numbers,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def installed_version(package: str) -> str | None:
    """Return the version of a package, None when it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    found = {name.strip(): value.strip() for name, value in fields.items()}
    return {
        "cpu": found.get("model name", platform.machine()),
        "family_model": f"{found.get('cpu family', '?')}/{found.get('model', '?')}",
        "flags": [flag for flag in ("avx512_bf16", "amx_bf16") if flag in found.get("flags", "").split()],
    }


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    found = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "gb": round(properties.total_memory / 1e9, 1),
        "cuda": torch.version.cuda,
    }
    identity = f"GPU-{str(properties.uuid).removeprefix('GPU-')}"
    command = ["nvidia-smi", f"--id={identity}", f"--query-gpu={','.join(_CLOCKS)}", "--format=csv,noheader"]
    _keep_busy(device)
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return found | {"clocks": "clocks unknown: nvidia-smi does not answer"}
    sm, most, memory, power, driver = (word.strip() for word in output.splitlines()[0].split(","))
    return found | {"clocks": f"SM {sm} of {most}, memory {memory}, power limit {power}", "driver": driver}


def _keep_busy(device: torch.device, seconds: float = 2.0) -> None:
    """Queue matrix products that take about so long: the clocks of an idle GPU say nothing."""
    a = torch.randn(8192, 8192, device=device).bfloat16()
    began = time.perf_counter()
    for _ in range(4):
        product = a @ a
    torch.cuda.synchronize(device)
    for _ in range(int(4 * seconds / (time.perf_counter() - began))):
        torch.mm(a, a, out=product)


def machine_lines(host: dict[str, Any]) -> list[str]:
    """Return the machine as lines of at most 80 characters."""
    cpu = f"{host['cpu']}{''.join(f', {flag}' for flag in host['flags'])}, {host['cores']} cores, "
    lines = [f"{cpu}{host['threads']} threads"]
    if gpu := host.get("gpu"):
        lines.append(f"{gpu['name']}, {gpu['gb']:g} GB, capability {gpu['capability']}, CUDA {gpu['cuda']}")
        lines.append(gpu["clocks"] + (f", driver {gpu['driver']}" if "driver" in gpu else ""))
    lines.append(", ".join(f"{name} {number}" for name, number in host["versions"].items()))
    return [line for text in lines for line in textwrap.wrap(text, 80)]


def write_page(path: Path, title: str, host: dict[str, Any], table: str, reading: str) -> None:
    """Write a page as in docs/benchmarks: what was run and when, what it printed, how to read it."""
    where = host["gpu"]["name"] if "gpu" in host else "a CPU"
    body = f"{host['date']}:\n\n    {host['command']}\n\n```\n{table}\n```\n\n{textwrap.fill(reading, 118)}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# {title} on {where}\n\n{body}")
