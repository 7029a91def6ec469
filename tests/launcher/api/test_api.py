"""The Python API: what the commands do, from a program of the user's own."""

import inspect
import re
import sys
from pathlib import Path

import processes
import pytest
from places import ROOT
from readme import blocks, make_reader
from running import Enc

import enc as package
from enc.launcher import api


def test_the_page_runs(enc: Enc, environment: dict[str, str]) -> None:
    """The code of the page in the folder of the README: a store, a run, vectors of its model."""
    folder = enc.folder / "reader"
    folder.mkdir()
    make_reader(folder)
    (folder / "page.py").write_text(blocks(ROOT / "docs" / "python.md", "python")[0])
    done = processes.run([sys.executable, "page.py"], folder, environment, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == f"{folder / 'runs' / 'python'} 0"
    layers, tokens, shape = re.fullmatch(r"(\d+) (\d+) (\(.*\))", second).groups()
    assert (layers, shape) == ("4", "(2, 64)")
    assert int(tokens) > 1000


@pytest.mark.parametrize("name", api.__all__)
def test_every_name_is_told(name: str) -> None:
    """In a docstring, and functions on the page too."""
    found = getattr(package, name)
    assert found.__doc__
    assert not inspect.isfunction(found) or f"enc.{name}(" in (ROOT / "docs" / "python.md").read_text()


def test_errors_are_those_of_the_commands(tmp_path: Path) -> None:
    with pytest.raises(package.UsageError, match=r"my.yaml.*did you mean|no such file|There is no"):
        package.load_config(tmp_path / "my.yaml")
    with pytest.raises(package.UsageError):
        package.load_model(tmp_path)
    with pytest.raises(package.UsageError, match=r"trainer\.max_stepz"):
        package.load_config("smoke", {"trainer.max_stepz": 3})


def test_notes_are_said() -> None:
    said: list[str] = []
    config = package.load_config("smoke", {"dataset.pin_memory": True}, say=said.append)
    assert config.trainer.max_steps == 10
    assert any("dataset.pin_memory" in text for text in said)
