"""Compile every Triton kernel that a launcher would start, for GPUs that are not here, and judge the machine code.

    python tests/support/aot.py masked_ce --arch 90 [--only recompute] [--json]

The real launchers run on meta tensors. What they would start is compiled instead, with the very arguments, constants
and options of the launch, and assembled with Triton's ptxas, which tells registers and spills. Run in a process of its
own: without TRITON_INTERPRET, and with whatever triton is first on PYTHONPATH.
"""

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import jit

from enc.kernels import dispatch

SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes a block may ask for
_TENSOR_CORE = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")


@dataclass(frozen=True)
class Compiled:
    """What became of one launch."""

    case: str
    kernel: str
    arch: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_core_instructions: int
    has_dot: bool
    num_warps: int
    warnings: list[str]

    @property
    def faults(self) -> list[str]:
        """What may not be in a kernel that is used."""
        found = [f"{self.spill_bytes} bytes spilled"] if self.spill_bytes else []
        if self.shared_bytes > SHARED_LIMIT[self.arch]:
            found.append(f"{self.shared_bytes} bytes of shared memory, of {SHARED_LIMIT[self.arch]}")
        if self.has_dot and not self.tensor_core_instructions:
            found.append("a matrix product without tensor cores")
        return found + self.warnings


def compile_all(op: str, arch: int, only: str = "") -> list[Compiled]:
    """Compile what the launches of `tests/aot_<op>.py` start on a chip, every distinct kernel once."""
    found: dict[str, Compiled] = {}
    case = ""

    def compile_instead(kernel: jit.JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        source, settings = _source(kernel, arch, args, options)
        key = f"{source.hash()} {settings}"
        if key not in found:
            found[key] = _compile(case, source, settings, arch)

    with (
        mock.patch.object(jit.JITFunction, "run", compile_instead),
        mock.patch.object(dispatch, "capability", return_value=divmod(arch, 10)),
    ):
        for name, launch in importlib.import_module(f"aot_{op}").launches(torch.device("meta")):
            case = name
            if only in name:
                launch()
    return list(found.values())


def _source(kernel: Any, arch: int, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[ASTSource, dict[str, Any]]:
    """Do what triton does at a launch, up to the compilation."""
    backend = make_backend(GPUTarget("cuda", arch, 32))
    binder = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = binder(*args, **options)
    settings, signature, constants, attrs = kernel._pack_args(backend, options, bound, specialization, None)
    return ASTSource(kernel, signature, constants, attrs), settings.__dict__


def _compile(case: str, source: ASTSource, settings: dict[str, Any], arch: int) -> Compiled:
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=settings)
    ptx = built.asm["ptx"]
    said = _assemble(ptx, arch)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    return Compiled(
        case, source.name, arch,
        registers=max(map(int, re.findall(r"Used (\d+) registers", said))),
        spill_bytes=sum(int(number) for pair in spills for number in pair),
        shared_bytes=built.metadata.shared,
        tensor_core_instructions=len(_TENSOR_CORE.findall(ptx)),
        has_dot="tt.dot" in built.asm["ttir"],
        num_warps=settings["num_warps"],
        warnings=[line for line in said.splitlines() if "C7511" in line or "serialized" in line],
    )  # fmt: skip


def _assemble(ptx: str, arch: int) -> str:
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    suffix = "a" if arch >= 90 else ""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [
            tools / ("ptxas-blackwell" if arch >= 100 else "ptxas"), "-v", f"--gpu-name=sm_{arch}{suffix}", source,
            "-o", Path(folder) / "kernel.cubin",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ptxas refuses a kernel for sm_{arch}: {done.stderr[:500]}")
    return done.stdout + done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op")
    parser.add_argument("--arch", type=int, default=90, choices=sorted(SHARED_LIMIT))
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    found = compile_all(args.op, args.arch, args.only)
    if args.json:
        print(json.dumps({"triton": triton.__version__, "kernels": [asdict(c) | {"faults": c.faults} for c in found]}))
        return
    print(f"triton {triton.__version__}, sm_{args.arch}")
    for c in found:
        print(
            f"{c.case:44} {c.kernel:28} {c.num_warps:2} warps {c.registers:3} registers {c.spill_bytes:5} spilled "
            f"{c.shared_bytes:7} shared {c.tensor_core_instructions:3} mma  {'; '.join(c.faults)}"
        )


if __name__ == "__main__":
    main()
