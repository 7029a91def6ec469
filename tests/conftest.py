"""Shared parts of the tests: the installed `enc` command, and one small token store that is made once."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ENC = [sys.executable, "-c", "from enc.launcher.cli import main; main()"]


class Enc:
    """Runs the command line in a working folder, as a user would."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = environment

    def start(self, *words: str, **options: Any) -> subprocess.Popen:
        """Start a command and return its process."""
        return subprocess.Popen(
            [*ENC, *words], cwd=self.folder, env=self.environment, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
        )  # fmt: skip

    def __call__(self, *words: str, code: int | None = 0, timeout: float = 300) -> subprocess.CompletedProcess:
        """Run a command to its end; `code` is the exit code that it must have (None: any)."""
        process = self.start(*words)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            raise AssertionError(f"enc {words} took more than {timeout} s:\n{out}\n{err}") from None
        done = subprocess.CompletedProcess(words, process.returncode, out, err)
        assert code is None or done.returncode == code, f"enc {' '.join(words)} -> {done.returncode}\n{out}\n{err}"
        return done

    def records(self, run: str, key: str = "loss") -> dict[int, dict[str, Any]]:
        """Return the metrics records of a run that have a key, by step."""
        lines = (self.folder / run / "metrics.jsonl").read_text().splitlines()
        return {record["step"]: record for record in map(json.loads, lines) if key in record}

    def events(self, run: str) -> list[dict[str, Any]]:
        """Return the events of a run."""
        return [json.loads(line) for line in (self.folder / run / "events.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """The environment of commands: plain width, no colours, offline."""
    quiet = {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return {**os.environ, **quiet}


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Path:
    """The token store of the `smoke` recipe."""
    folder = tmp_path_factory.mktemp("store")
    return folder / Enc(folder, environment)("preprocess", "smoke").stdout.strip()


@pytest.fixture
def enc(tmp_path: Path, environment: dict[str, str]) -> Enc:
    """The `enc` command in an empty working folder."""
    return Enc(tmp_path, environment)


@pytest.fixture
def smoke(enc: Enc, store: Path) -> Callable[..., list[str]]:
    """Words that launch the `smoke` recipe in a run folder on the ready token store, with overrides."""

    def words(run: str, *overrides: str) -> list[str]:
        ready = [f"dataset.pre_tokenize_output={store}", f"trainer.output_dir={run}", "trainer.disable_tqdm=true"]
        return ["launch", "pretrain", "smoke", *ready, *overrides]

    return words
