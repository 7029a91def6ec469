"""A rehearsal hits a user's own run with real trouble on this machine, and compares the bytes."""

import json
from collections.abc import Callable

import pytest
from running import Enc


@pytest.mark.slow
def test_a_run_survives_its_rehearsal(enc: Enc, smoke: Callable[..., list[str]]) -> None:
    """A disk that is full at a save, and a time limit: both are met, and nothing is left behind."""
    words = smoke(
        "run", "--nodes", "2", "--nproc-per-node", "1", "--rehearse", "--trouble", "full-disk,time-limit", "--json"
    )
    verdict = json.loads(enc(*words).stdout)
    assert verdict["survived"]
    assert verdict["same_bytes"]
    assert [(act["trouble"], act["cause"]) for act in verdict["troubles"]] == [
        ("full-disk", "crash"), ("time-limit", "time_limit")
    ]  # fmt: skip
    assert not (enc.folder / "run.rehearsal").exists()
    assert not (enc.folder / "run").exists()


def test_a_run_that_fails_by_itself_is_told_so(enc: Enc, smoke: Callable[..., list[str]]) -> None:
    """Before any trouble is made, and its logs stay, whatever the folder is called."""
    done = enc(*smoke("a {run}", "--rehearse", "trainer.min_free_disk_gb=1e9"), code=3)
    assert "fails even undisturbed" in done.stderr
    assert (enc.folder / "a {run}.rehearsal" / "undisturbed" / "logs" / "1" / "rank0.log").is_file()
