"""Measure `enc ckpt consolidate` against the tools that DeepSpeed and torch bring: time and memory, results compared.

    python -m enc.tools.bench.consolidate                 # two folders of 6 GB each, a few minutes
    python -m enc.tools.bench.consolidate --gb 0.02 --rounds 1 --json

Two sources are written to a temporary folder, one after the other, with the same random tensors of an encoder: a
native DeepSpeed ZeRO-3 folder of `--ranks` ranks, and a torch.distributed.checkpoint (DCP) folder. Both hold weights
and two moments in fp32; a third of the bytes are weights. Each side writes the weights as it does by default:

    ZeRO-3    enc             `enc ckpt consolidate`
              zero_to_fp32    `python -m deepspeed.utils.zero_to_fp32 --safe_serialization`
    DCP       enc             `enc ckpt consolidate`
              torch           `torch.distributed.checkpoint.format_utils dcp_to_torch`; it takes the moments along

Each runs in a process of its own, in turning order, round after round, with the source in the page cache. The time is
that of the whole process, imports included; `enc` alone flushes its files to disk before it ends. `peak` is the largest
resident size of the process as Linux counts it (VmHWM), with pages of memory-mapped files; `own` is the largest size of
what no file backs (RssAnon). Both are read every 10 ms. (The rusage of a child counts its parent's memory too.)
"""

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from enc.tools.bench.consolidate_sources import encoder_shapes, write_dcp, write_zero3
from enc.tools.readers.detect import open_source

ENC = [sys.executable, "-c", "from enc.launcher.cli.app import main; main()", "ckpt", "consolidate"]
TORCH = [sys.executable, "-m", "torch.distributed.checkpoint.format_utils", "dcp_to_torch"]
DEEPSPEED = [sys.executable, "-m", "deepspeed.utils.zero_to_fp32"]
RIVALS = {"ZeRO-3": "zero_to_fp32", "DCP": "torch"}


@dataclass(frozen=True)
class Measured:
    """What one process used."""

    seconds: float
    peak_mb: float
    own_mb: float


def command(side: str, source: Path, out: Path) -> list[str]:
    """Return the words of one side's command."""
    if side == "enc":
        return [*ENC, str(source), "--out", str(out)]
    if side == "torch":
        return [*TORCH, str(source), str(out)]
    return [*DEEPSPEED, str(source), str(out), "--safe_serialization"]


def measure(words: list[str]) -> Measured:
    """Run a process to its end. Raises RuntimeError when it fails."""
    began = time.perf_counter()
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    peak = own = 0.0
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
        while process.poll() is None:
            resident = _resident_mb(process.pid)
            peak, own = max(peak, resident.get("VmHWM", 0.0)), max(own, resident.get("RssAnon", 0.0))
            time.sleep(0.01)
        seconds = time.perf_counter() - began
        errors.seek(0)
        if process.returncode:
            raise RuntimeError(f"{' '.join(words)} failed: {errors.read().decode()[-2000:]}")
    return Measured(seconds, peak, own)


def _resident_mb(pid: int) -> dict[str, float]:
    """Return the sizes of a process that Linux counts; none when it has just ended."""
    try:
        lines = [line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
    except OSError:
        return {}
    return {words[0].rstrip(":"): int(words[1]) * 1024 / 1e6 for words in lines if words[-1] == "kB"}


def compare(ours: Path, theirs: Path) -> int:
    """Return the number of weights that are equal bit for bit. Raises AssertionError when one is not."""
    a, b = open_source(ours).weights, open_source(theirs).weights
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    for name in a:
        assert torch.equal(a[name].read(), b[name].read()), name
    return len(a)


def bench(kind: str, source: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """Measure both sides on one source, in turning order, and compare what they wrote."""
    runs: dict[str, list[Measured]] = {"enc": [], RIVALS[kind]: []}
    num_equal = 0
    for number in range(rounds):
        order = list(runs) if number % 2 == 0 else list(runs)[::-1]
        outputs = {side: folder / (f"{side}.pt" if side == "torch" else side) for side in order}
        for side in order:
            print(f"{kind}, round {number + 1} of {rounds}: {side}", file=sys.stderr)
            runs[side].append(measure(command(side, source, outputs[side])))
        num_equal = compare(outputs["enc"], outputs[RIVALS[kind]])
        for path in outputs.values():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    size = sum(p.stat().st_size for p in source.rglob("*") if p.is_file())
    sides = {side: [asdict(run) for run in measured] for side, measured in runs.items()}
    return {"source_gb": size / 1e9, "tensors_equal": num_equal, "sides": sides}


def _tensors(shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        yield name, torch.randn(shape, generator=generator)


# --- what is printed -------------------------------------------------------------------------------------------------


def _median(runs: list[dict[str, float]], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def table(report: dict[str, Any]) -> str:
    """Lay the report out for 80 columns."""
    lines = [report["machine"], report["versions"], f"largest tensor {report['largest_tensor_mb']:.0f} MB", ""]
    lines.append(f"{'source':<15} {'side':<13}{'seconds':>8} {'peak MB':>8} {'own MB':>8}  enc: time, peak")
    for kind, result in report["results"].items():
        ours = result["sides"]["enc"]
        for side, runs in result["sides"].items():
            figures = [_median(runs, key) for key in ("seconds", "peak_mb", "own_mb")]
            line = f"{kind} {result['source_gb']:.2f} GB"
            line = f"{line:<15} {side:<13}{figures[0]:>8.2f} {figures[1]:>8.0f} {figures[2]:>8.0f}"
            if side != "enc":
                ratios = [_median(ours, key) / max(_median(runs, key), 1e-9) for key in ("seconds", "peak_mb")]
                line += f"  {ratios[0]:.2f} x, {ratios[1]:.2f} x"
            lines.append(line)
        lines.append(f"{'':<15} {result['tensors_equal']} weights equal bit for bit")
    return "\n".join(lines)


def _machine() -> str:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = next((line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return f"{name or platform.machine()}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GB memory"


def main() -> None:
    """Write the sources, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gb", type=float, default=6.0, help="size of each source")
    parser.add_argument("--ranks", type=int, default=4, help="ranks of the ZeRO-3 folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; by default the temporary folder")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    shapes = encoder_shapes(options.gb * 1e9 / 12)
    results = {}
    for kind in RIVALS:
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            source = Path(name) / "source"
            print(f"Writing a {kind} folder of {options.gb:g} GB ...", file=sys.stderr)
            if kind == "ZeRO-3":
                write_zero3(source, shapes, _tensors(shapes), options.ranks)
            else:
                write_dcp(source, shapes, _tensors(shapes))
            results[kind] = bench(kind, source, Path(name), options.rounds)
    packages = ("torch", "deepspeed", "safetensors", "enc-toolkit")
    report = {
        "machine": _machine(),
        "versions": ", ".join(f"{package} {version(package)}" for package in packages),
        "largest_tensor_mb": max(math.prod(shape) for shape in shapes.values()) * 4 / 1e6,
        "results": results,
    }
    print(json.dumps(report, indent=1) if options.json else table(report))


if __name__ == "__main__":
    main()
