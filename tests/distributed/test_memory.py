"""The memory that `static_bytes` computes is the memory that the real engines hold."""

import json

import pytest
from cluster import UNEVEN, Cluster

ENGINES = {
    "ddp": ["parallel.engine=ddp"],
    "fsdp": ["parallel.engine=fsdp"],
    "fsdp-offload": ["parallel.engine=fsdp", "parallel.offload=parameters"],
    **{f"zero{stage}": ["parallel.engine=deepspeed", f"parallel.zero_stage={stage}"] for stage in range(4)},
}
OFFLOAD = {
    "zero2-offload": [*ENGINES["zero2"], "parallel.offload=optimizer"],
    "zero3-offload-optimizer": [*ENGINES["zero3"], "parallel.offload=optimizer"],
    "zero3-offload": [*ENGINES["zero3"], "parallel.offload=parameters"],
    "zero3-reduced": [*ENGINES["zero3"], "parallel.reduce_dtype=bf16"],
}
CASES = {
    2: [
        *((name, words, precision) for name, words in ENGINES.items() for precision in ("no", "bf16")),
        *((name, words, "bf16") for name, words in OFFLOAD.items()),
    ],
    3: [(name, ENGINES[name], "bf16") for name in ("fsdp", "zero2", "zero3")],
}


@pytest.mark.parametrize("world_size", CASES)
def test_static_bytes_are_what_engines_hold(cluster: Cluster, world_size: int) -> None:
    """To 1 %, counting the storage of every tensor that two updates leave alive."""
    runs = {}
    for name, words, precision in CASES[world_size]:
        options = [*UNEVEN, *words, f"trainer.mixed_precision='{precision}'"]
        runs[f"{name}-{precision}"] = cluster.prepare(f"bytes-{name}-{precision}-{world_size}", world_size, *options)
    cluster.act("count_bytes", world_size, list(runs.values()))
    found = {name: json.loads((run / "bytes.json").read_text()) for name, run in runs.items()}
    for name, count in found.items():
        print(f"{name} on {world_size} ranks: {count['held']:,} bytes held, {count['computed']:,} computed")
    wrong = {name: c for name, c in found.items() if c["computed"] != pytest.approx(c["held"], rel=0.01)}
    assert not wrong
