"""Running the installed `enc` command from tests."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import processes

ENC = [sys.executable, "-c", "from enc.launcher.cli.app import main; main()"]


class Enc:
    """Runs the command line in a working folder, as a user would; `real` starts interpreters instead of forks."""

    def __init__(self, folder: Path, environment: dict[str, str], real: bool = False) -> None:
        self.folder = folder
        self.environment = environment
        self.real = real

    def start(self, *words: str) -> "subprocess.Popen | processes.Forked":
        """Start a command in the background; what it prints goes to `background.log`."""
        with (self.folder / "background.log").open("a") as log:
            return processes.start([*ENC, *words], self.folder, self.environment, log, log, self.real)

    def __call__(self, *words: str, code: int | None = 0, timeout: float = 300) -> subprocess.CompletedProcess:
        """Run a command to its end; `code` is the exit code that it must have (None: any)."""
        done = processes.run([*ENC, *words], self.folder, self.environment, timeout, self.real)
        assert code is None or done.returncode == code, (
            f"enc {' '.join(words)} -> {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
        return done

    def records(self, run: str, key: str = "loss") -> dict[int, dict[str, Any]]:
        """Return the metrics records of a run that have a key, by step."""
        lines = (self.folder / run / "metrics.jsonl").read_text().splitlines()
        return {record["step"]: record for record in map(json.loads, lines) if key in record}

    def events(self, run: str) -> list[dict[str, Any]]:
        """Return the events of a run."""
        return [json.loads(line) for line in (self.folder / run / "events.jsonl").read_text().splitlines()]


# What a metrics record says of the clock and the machine.
_TIMES = {
    "time",
    "tokens_per_s",
    "mfu",
    "data_wait_s",
    "forward_s",
    "backward_s",
    "optimizer_s",
    "step_s",
    "save_stall_s",
    "max_memory_mb",
}


def exact(records: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Drop from metrics records what may differ between two equal runs."""
    return {step: {k: v for k, v in record.items() if k not in _TIMES} for step, record in records.items()}
