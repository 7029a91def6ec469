"""Shared parts of the tests: the installed `enc` command, and one small token store that is made once."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from running import Enc


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
