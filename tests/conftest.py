"""Shared parts of the tests: the installed `enc` command, and one small token store that is made once."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from foreign import CASES, run_writer
from processes import quiet_environment
from running import Enc
from shared import made_once

pytest_plugins = ["order", "budgets", "skips"]

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in the background of a shell: programs would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """The environment of commands: plain width, no colours, offline."""
    return quiet_environment()


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Path:
    """The token store of the `smoke` recipe."""

    def make(folder: Path) -> Path:
        return folder / Enc(folder, environment)("preprocess", "smoke").stdout.strip()

    return made_once(tmp_path_factory, "store", make)


@pytest.fixture(scope="session")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of DeepSpeed and FSDP2: <case>/, and its true state in <case>.safetensors."""

    def make(folder: Path) -> Path:
        run_writer("write", str(folder), *CASES, "fsdp", "neobert", "trainer")
        return folder

    return made_once(tmp_path_factory, "foreign", make)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str], store: Path) -> Path:
    """A run of 6 steps with checkpoints 3 and 6."""

    def make(folder: Path) -> Path:
        words = ["trainer.max_steps=6", "trainer.save_steps=3", "dataset.num_workers=0", "scheduler.total_steps=6"]
        ready = [f"dataset.pre_tokenize_output={store}", "trainer.output_dir=run"]
        Enc(folder, environment)("launch", "pretrain", "smoke", *ready, *words)
        return folder / "run"

    return made_once(tmp_path_factory, "finished_run", make)


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
