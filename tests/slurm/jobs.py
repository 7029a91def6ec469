"""Runs on the test cluster: launched as a user would, disturbed as a cluster would."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster_slurm import Slurm
from running import Enc

OPTIONS = ["trainer.use_cpu=true", "launch.heartbeat_s=0.5", "launch.slurm.time=10", "launch.env.OMP_NUM_THREADS='1'",
           "trainer.disable_tqdm=true", "launch.slurm.signal_s=10"]  # fmt: skip


class Runs:
    """Launches runs in a folder and watches them by their files."""

    def __init__(self, slurm: Slurm, folder: Path, environment: dict[str, str], store: Path) -> None:
        self.slurm, self.folder, self.store = slurm, folder, store
        self.waits: dict[str, float] = {}
        self.enc = Enc(folder, {**environment, **slurm.variables})

    def launch(self, run: str, *words: str, recipe: str = "smoke") -> str:
        """Submit a run and return its job."""
        done = self.enc("launch", "pretrain", recipe, f"dataset.pre_tokenize_output={self.store}",
                        f"trainer.output_dir={run}", *OPTIONS, *words)  # fmt: skip
        return done.stdout.strip()

    def events(self, run: str) -> list[dict[str, Any]]:
        """Return a run's events; a line that is being written does not count yet."""
        path = self.folder / run / "events.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def endings(self, run: str) -> list[tuple[str, str]]:
        """Return (cause, decision) of each attempt."""
        return [(e["cause"], e["decision"]) for e in self.events(run) if e["event"] == "attempt_ended"]

    def step(self, run: str) -> int:
        """Return the last logged step."""
        path = self.folder / run / "metrics.jsonl"
        lines = [line for line in path.read_text().splitlines(keepends=True)] if path.exists() else []
        steps = [json.loads(line)["step"] for line in lines if line.endswith("\n")]
        return steps[-1] if steps else 0

    def until(self, condition: Callable[[], bool], run: str, timeout_s: float = 150) -> None:
        """Wait; a requeued job is let into the queue at once."""
        limit = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < limit, self.story(run)
            self.hurry()
            time.sleep(0.1)

    def until_step(self, run: str, step: int) -> None:
        self.until(lambda: self.step(run) >= step, run)

    def until_over(self, run: str, timeout_s: float = 200) -> dict[str, Any]:
        """Wait for the run's last word and return it."""
        self.until(lambda: any(decision == "stop" for _, decision in self.endings(run)), run, timeout_s)
        return [event for event in self.events(run) if event["event"] == "attempt_ended"][-1]

    def hurry(self) -> None:
        """A requeued job waits for a while before it may start; tests have time for three seconds of that.

        Started at once, SLURM would kill it: the nodes take its new credential for the one that was just revoked.
        """
        done = subprocess.run(["squeue", "-h", "-t", "PENDING", "-o", "%i %r"], env=self.slurm.variables,
                              capture_output=True, text=True, check=False)  # fmt: skip
        for line in done.stdout.splitlines():
            job, _, reason = line.partition(" ")
            if reason != "BeginTime":
                self.waits.pop(job, None)
            elif time.monotonic() - self.waits.setdefault(job, time.monotonic()) > 3:
                self.waits.pop(job)
                words = ["scontrol", "update", f"JobId={job}", "StartTime=now"]
                subprocess.run(words, env=self.slurm.variables, capture_output=True, check=False)

    def story(self, run: str) -> str:
        """Return what there is to read when a test fails."""
        logs = sorted((self.folder / run / "logs").rglob("*.log"))
        texts = [f"--- {path.name}\n{path.read_text()[-1500:]}" for path in logs]
        queue = subprocess.run(
            ["squeue", "-t", "all"], env=self.slurm.variables, capture_output=True, text=True, check=False
        )
        events = "\n".join(json.dumps(event)[:400] for event in self.events(run))
        return "\n".join([events, *texts, queue.stdout])

    # --- trouble -----------------------------------------------------------------------------------------------------

    def rank_pid(self, run: str, rank: int) -> int:
        """Return the trainer of a rank in the newest attempt."""
        newest = max(int(p.name) for p in (self.folder / run / "logs").glob("[0-9]*"))
        return json.loads((self.folder / run / "logs" / str(newest) / "ranks" / f"{rank}.json").read_text())["pid"]

    def hit_rank(self, run: str, rank: int, number: signal.Signals) -> None:
        os.kill(self.rank_pid(run, rank), number)

    def kill_batch(self, run: str) -> None:
        """Kill the batch process of a run."""
        owner = json.loads((self.folder / run / ".lock").read_text())
        os.kill(owner["pid"], signal.SIGKILL)

    def weights(self, run: str, step: int) -> bytes:
        return (self.folder / run / "checkpoints" / str(step) / "model.safetensors").read_bytes()
