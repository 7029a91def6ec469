"""The benchmark of consolidation: that DeepSpeed and torch read its sources and all weights agree. No figures."""

import json
import subprocess
import sys
from pathlib import Path


def test_every_side_gives_the_same_weights(tmp_path: Path) -> None:
    """A tiny run of the whole benchmark; it compares what the sides wrote, bit for bit."""
    words = ["--gb", "0.005", "--ranks", "3", "--rounds", "1", "--folder", str(tmp_path), "--json"]
    command = [sys.executable, "-m", "enc.tools.bench.consolidate", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)["results"]
    assert {kind: list(result["sides"]) for kind, result in results.items()} == {
        "ZeRO-3": ["enc", "zero_to_fp32"],
        "DCP": ["enc", "torch"],
    }
    assert all(result["tensors_equal"] > 20 for result in results.values())
    assert all(run["peak_mb"] > 50 for result in results.values() for runs in result["sides"].values() for run in runs)
    assert not list(tmp_path.iterdir())
