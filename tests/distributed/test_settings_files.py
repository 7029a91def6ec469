"""What the file of a run folder tells an engine is what the engine does."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster

from enc.launcher.machine.ports import free_port

SHORT = ["trainer.max_steps=3", "trainer.save_steps=3", "trainer.gradient_clipping=1.0"]
DEEPSPEED = ["parallel.engine=deepspeed", "parallel.zero_stage=2", *SHORT]
FSDP = ["parallel.engine=fsdp", "trainer.mixed_precision='no'", *SHORT]


def edit(run_dir: Path, name: str, **values: Any) -> None:
    path = run_dir / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_an_edited_file_is_what_the_engine_is_built_with(cluster: Cluster) -> None:
    """The same numbers from the file as it was rendered, others from one with another clipping or dtype of sums."""
    kinds = {"deepspeed": DEEPSPEED, "fsdp": FSDP}
    names = [f"file-{kind}-{state}" for kind in kinds for state in ("rendered", "again", "edited")]
    runs = {name: cluster.prepare(name, 2, *kinds[name.split("-")[1]]) for name in names}
    edit(runs["file-deepspeed-edited"], "ds_config.json", gradient_clipping=1e-7)
    edit(runs["file-fsdp-edited"], "fsdp.json", reduce_dtype="bf16")
    cluster.train(2, list(runs.values()))
    for kind in kinds:
        rendered, again, edited = (
            cluster.weights(f"file-{kind}-{state}", 3) for state in ("rendered", "again", "edited")
        )
        assert rendered == again
        assert rendered != edited


@pytest.mark.parametrize(
    ("text", "says"),
    [(None, "cannot be read"), ("{", "is not valid JSON"), ('{"mesh": {"replicate": 1, "shard": 1}}', "lacks")],
)
def test_a_rank_refuses_a_broken_file(cluster: Cluster, tmp_path: Path, text: str | None, says: str) -> None:
    """One paragraph and exit code 2, before anything is trained."""
    run_dir = cluster.prepare(f"broken-{tmp_path.name}", 1, *FSDP)
    (run_dir / "fsdp.json").unlink()
    if text is not None:
        (run_dir / "fsdp.json").write_text(text)
    words = [sys.executable, "-m", "enc.encoder.run.start", str(run_dir)]
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = subprocess.run(
        words, env={**cluster.environment, **place}, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "fsdp.json" in line]
    assert says in line
    assert line.endswith("`enc launch` and `enc resume` write it anew.")
    assert not (run_dir / "metrics.jsonl").exists() or not (run_dir / "metrics.jsonl").read_text()
