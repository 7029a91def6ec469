"""The memory that `static_bytes` computes is the memory that the real engines hold."""

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "held_bytes.py"
STAGES = [f"deepspeed,{stage},{precision},none,fp32" for stage in (1, 2, 3) for precision in ("bf16", "no")]
OFFLOADS = ["deepspeed,2,bf16,optimizer,fp32", "deepspeed,3,bf16,optimizer,fp32", "deepspeed,3,bf16,parameters,fp32"]
CASES = [
    "ddp,0,no,none,fp32",
    "fsdp,0,bf16,none,fp32",
    "deepspeed,0,no,none,fp32",
    "deepspeed,3,bf16,none,bf16",
    *STAGES,
    *OFFLOADS,
]


def measure(cases: list[str], world_size: int) -> dict[str, tuple[int, int]]:
    """Return the bytes that rank 0 held after two steps of each case, and those that `static_bytes` computes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = min(probe.getsockname()[1], 60_000)
    places = {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "GOMP_SPINCOUNT": "100",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, WORKER, str(port), *cases], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, **places, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world_size)
    ]  # fmt: skip
    try:
        outputs = [rank.communicate(timeout=400) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), outputs[0][1][-3000:]
    held = [line.split()[1:] for line in outputs[0][0].splitlines() if line.startswith("held ")]
    return {case: (int(size), int(computed)) for case, size, computed in held}


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "cases"), [(2, CASES), (3, ["fsdp,0,no,none,fp32", "deepspeed,3,bf16,none,fp32"])]
)
def test_static_bytes_are_what_engines_hold(world_size: int, cases: list[str]) -> None:
    """To 1 %, counting the storage of every tensor that is alive after two steps on gloo."""
    held = measure(cases, world_size)
    assert set(held) == set(cases)
    for case, (size, computed) in held.items():
        assert computed == pytest.approx(size, rel=0.01), case
