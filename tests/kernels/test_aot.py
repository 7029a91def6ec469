"""Every Triton kernel, in every configuration that is chosen, is good machine code for GPUs that are not here."""

import json
import os
import subprocess
import sys

import pytest
from places import TESTS

OPS = {"masked_ce": "bfloat16", "varlen_attention": "bfloat16 64", "elementwise": "768"}  # op: its usual cases


@pytest.mark.parametrize("op", OPS)
def test_usual_kernels_compile_without_faults(op: str) -> None:
    """No spills, shared memory within the chip's, tensor cores where there is a matrix product, on an H100."""
    _judge(op, 90, dict(os.environ), "--only", OPS[op])


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_kernel_compiles_without_faults(arch: int, op: str) -> None:
    _judge(op, arch, dict(os.environ))


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernels_compile_with_the_triton_of_torch_2_11(
    arch: int, op: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "triton-3.6.0"
    if not folder.exists():
        words = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*words, "triton==3.6.0"], check=True, timeout=600)
    _judge(op, arch, {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"})


def _judge(op: str, arch: int, environment: dict[str, str], *words: str) -> None:
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(TESTS / "support" / "aot.py"), op, "--arch", str(arch), "--json", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kernels"]
    for k in found["kernels"]:
        print(
            f"triton {found['triton']} sm_{arch} {k['case']}: {k['kernel']}, {k['num_warps']} warps, "
            f"{k['registers']} registers, {k['shared_bytes']:,} bytes shared, "
            f"{k['tensor_core_instructions']} tensor core instructions"
        )
    assert not [(k["case"], k["kernel"], k["faults"]) for k in found["kernels"] if k["faults"]]
