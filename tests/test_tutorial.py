"""The tutorial, from text to classifier: its commands run as written, and its numbers are about those that one gets."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT
from readme import blocks

ENC = "from enc.launcher.cli.app import main; main()"


@pytest.mark.slow
def test_the_tutorial(tmp_path: Path, environment: dict[str, str]) -> None:
    """Every command ends well, the classifiers are as good as the page says, texts of a kind are near each other."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    said = {}
    for line in "".join(blocks(ROOT / "docs" / "tutorial.md", "bash")).splitlines():
        program, *words = shlex.split(line)
        start = [sys.executable, "-c", ENC] if program == "enc" else [sys.executable]
        done = subprocess.run(
            [*start, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=3600, check=False
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        said[line] = done.stdout
    right = [_percent("right on", said[line]) for line in said if "classify.py" in line]
    assert all(share > 80 for share in right)
    assert _percent("same package for", said["python examples/nearest.py runs/tutorial"]) > 35


def _percent(before: str, text: str) -> float:
    found = re.search(rf"{before} ([\d.]+)%", text)
    assert found, text
    return float(found[1])
