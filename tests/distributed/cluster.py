"""Runs on real gloo ranks, many in one start of the processes."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import processes

from enc.encoder.config.load import load_config
from enc.encoder.config.overrides import parse_overrides
from enc.launcher.machine.facts import look
from enc.launcher.machine.ports import free_port
from enc.launcher.planning.plan import plan_run
from enc.launcher.planning.render import render

SCRIPT = Path(__file__).with_name("runs.py")
# Sizes that no number of ranks divides evenly.
UNEVEN = ["model.hidden_size=96", "model.num_hidden_layers=3", "model.intermediate_size=200"]
STEPS, SAVED = 12, 6  # of every run, and its step that is saved
COMMON = [f"trainer.max_steps={STEPS}", f"trainer.save_steps={SAVED}", "trainer.save_total_limit=0",
          "trainer.eval_strategy=no",
          "trainer.use_cpu=true", "trainer.disable_tqdm=true", "dataset.num_workers=0",
          "parallel.bucket_size=100000"]  # fmt: skip


class Cluster:
    """Prepares run folders and trains them on a number of ranks."""

    def __init__(self, folder: Path, store: Path, environment: dict[str, str]) -> None:
        self.folder, self.store, self.environment = folder, store, environment

    def prepare(self, name: str, world_size: int, *overrides: str, goes_on: tuple[str, int] | None = None) -> Path:
        """Make a run folder; `goes_on` names another one and the step of its checkpoint to go on from."""
        run_dir = self.folder / name
        words = [f"dataset.pre_tokenize_output={self.store}", f"trainer.output_dir={run_dir}",
                 f"launch.nproc_per_node={world_size}", *COMMON, *overrides]  # fmt: skip
        if goes_on is not None:
            source = self.folder / goes_on[0]
            run_dir.mkdir(parents=True)
            shutil.copyfile(source / "metrics.jsonl", run_dir / "metrics.jsonl")
            words.append(f"trainer.resume_from_checkpoint={source / 'checkpoints' / str(goes_on[1])}")
        config = load_config("smoke", parse_overrides(words)).config
        run_dir.mkdir(parents=True, exist_ok=True)
        for file, text in render(plan_run(config, look())).items():
            (run_dir / file).write_text(text)
        return run_dir

    def train(self, world_size: int, runs: list[Path]) -> None:
        """Train prepared runs one after the other on `world_size` processes."""
        self.act("train_run", world_size, runs)

    def act(self, action: str, world_size: int, runs: list[Path]) -> None:
        """Do one of the actions of runs.py with each of the runs."""
        listing = self.folder / f"runs-{world_size}.json"
        listing.write_text(json.dumps([(str(run), free_port()) for run in runs]))
        place = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1",
                 "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "10000"}  # fmt: skip
        ranks = []
        for rank in range(world_size):
            words = [sys.executable, str(SCRIPT), action, str(listing)]
            variables = {**self.environment, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with (self.folder / f"ranks-{world_size}-{rank}.log").open("a") as log:
                ranks.append(processes.start(words, self.folder, variables, log, log))
        try:
            codes = [process.wait(timeout=560) for process in ranks]
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        logs = [(self.folder / f"ranks-{world_size}-{rank}.log").read_text()[-2000:] for rank in range(world_size)]
        assert not any(codes), logs
        failures = [path.read_text() for run in runs for path in sorted(run.glob("failed-*.txt"))]
        assert not failures, failures[0]

    def records(self, name: str) -> dict[int, dict[str, Any]]:
        """Return a run's training records by step."""
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        return {record["step"]: record for record in map(json.loads, lines) if "loss" in record}

    def weights(self, name: str, step: int) -> bytes:
        return (self.folder / name / "checkpoints" / str(step) / "model.safetensors").read_bytes()
