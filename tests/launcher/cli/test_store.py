"""`enc store`: what a person reads fits a terminal, what a program reads is JSON."""

import json
from pathlib import Path

from running import Enc


def test_inspect(enc: Enc, store: Path) -> None:
    """Both splits, a histogram whose longest bar is full, decoded text, and nothing wider than 80 columns."""
    shown = enc("store", "inspect", str(store)).stdout
    assert max(map(len, shown.splitlines())) <= 80
    found = json.loads(enc("store", "inspect", str(store), "--json").stdout)
    for name, split in found["splits"].items():
        assert f"{name}  {split['documents']:,} documents, {split['tokens']:,} tokens" in shown
    assert shown.count("▇" * 24) >= 2
    assert "made from" in shown
    assert "is not a token store" in enc("store", "inspect", str(store.parent), code=2).stderr


def test_tokenizer(enc: Enc, store: Path) -> None:
    """The own tokenizer first, then the others in the order in which they were named; nothing is fetched."""
    (enc.folder / "a.txt").write_text("some words to read\n")
    words = ["store", "tokenizer", str(store), "a.txt", "--against", str(store / "tokenizer"), "--against", "no/such"]
    shown = enc(*words)
    assert shown.stdout.count("a word") == 2
    assert "nor in the hub's cache" in " ".join(shown.stdout.split())
    assert "Retrying" not in shown.stderr
    rows = json.loads(enc(*words, "--json").stdout)
    assert rows[0]["tokens"] == rows[1]["tokens"]
    assert rows[2]["tokenizer"] == "no/such"


def test_settings_that_a_finished_store_does_not_follow(enc: Enc, store: Path) -> None:
    """What is held out was decided when it was made; those it was made with are not mentioned."""
    done = enc("preprocess", "smoke", f"dataset.path={store}", "dataset.eval_samples=7")
    assert "dataset.eval_samples=7 has no effect on a finished token store; it was made with 64" in done.stderr
    assert "no effect" not in enc("preprocess", "smoke", f"dataset.path={store}").stderr
