"""The benchmark of the training step: that it compares like with like. Its figures are not tested."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROWS, ROW_LENGTH = 4, 64


@pytest.fixture(scope="module")
def command(store: Path, environment: dict[str, str]) -> list[str]:
    """Return words that run the benchmark on a tiny model for a second."""
    small = ["--layers", "2", "--width", "64", "--heads", "2", "--rows", str(ROWS), "--row-length", str(ROW_LENGTH)]
    short = ["--min-rounds", "2", "--minutes", "0", "--steps", "2", "--store", str(store)]
    return [sys.executable, "-m", "enc.tools.bench.step", *small, *short]


def _output(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_sides_train_on_the_same_number_of_useful_tokens(command: list[str], environment: dict[str, str]) -> None:
    """Every side's step has about enc's useful tokens, only the padded ones waste places, and models weigh the same."""
    report = json.loads(_output([*command, "--json", "--dtype", "fp32"], environment))
    sides = report["results"]["fp32"]
    full = ROWS * ROW_LENGTH
    assert sides["full"]["fill"] == 1
    assert sides["full"]["tokens_per_step"] == full
    assert 0.97 * full <= sides["enc"]["tokens_per_step"] <= full
    assert sides["natural"]["fill"] < 0.9
    assert sides["natural"]["tokens_per_step"] == pytest.approx(full, rel=0.5)  # a few short documents
    assert report["model"]["hf_parameters"] == pytest.approx(report["model"]["enc_parameters"], rel=0.1)
    for side in sides.values():
        assert [block["steps"] for block in side["blocks"]] == [2, 2]


def test_table_fits_80_columns(command: list[str], environment: dict[str, str]) -> None:
    """The table names the machine, the versions and each side, within 80 columns."""
    lines = _output([*command, "--dtype", "bf16", "--sides", "full"], environment).splitlines()
    assert max(map(len, lines)) <= 80
    assert "cores" in lines[0]
    assert "transformers" in lines[1]
    assert [line.split()[:2] for line in lines[-2:]] == [["bf16", "enc,"], ["bf16", "Trainer,"]]
    assert " x (" in lines[-1]


def test_cost_of_saves(environment: dict[str, str]) -> None:
    """The bench of saves runs a real launch and accounts for every part of a checkpoint's cost."""
    small = ["hidden_size=64", "num_hidden_layers=2", "num_attention_heads=2", "intermediate_size=128"]
    words = [word for setting in small for word in ("--set", f"model.{setting}")]
    words += ["--set", "tokenizer={train: {vocab_size: 512, max_documents: 200}}", "--rows", "1", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "enc.tools.bench.save", *words], env=environment, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["step_s"] > 0
    assert found["written_s"] > found["waited_s"] >= 0
    assert found["share"] == pytest.approx((found["waited_s"] + found["slower_s"]) / (100 * found["step_s"]))
