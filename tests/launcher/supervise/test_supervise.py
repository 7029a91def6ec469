"""The batch process of a run: what it does about a spoilt run folder and about a job that is nearly over."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from running import Enc

from enc.encoder.events import Event, append_event
from enc.encoder.heartbeat import note_rank, read_rank_files
from enc.launcher.run_folder.events import read_events
from enc.launcher.supervise import supervise


def test_a_full_disk_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows a decision is not done before the decision is written down."""
    monkeypatch.setattr(supervise, "_DISK_PAUSE_S", 0.01)
    tries = iter([OSError(28, "No space left on device")] * 2)

    def write() -> str:
        if error := next(tries, None):
            raise error
        return "written"

    assert supervise.written(write) == "written"


def test_an_event_that_did_not_fit_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is nearly full takes a part of a line; the next line is whole all the same."""
    whole = os.write
    monkeypatch.setattr(os, "write", lambda file, line: whole(file, line[:10]))
    with pytest.raises(OSError, match="No space left"):
        append_event(tmp_path, Event.RENDERED)
    monkeypatch.undo()
    append_event(tmp_path, Event.REHEARSED)
    assert [event["event"] for event in read_events(tmp_path)] == ["rehearsed"]


@pytest.mark.parametrize("spoilt", ["", "{", "[]"])
def test_a_spoilt_record_of_the_last_attempt_stops_nothing(tmp_path: Path, spoilt: str) -> None:
    """A node that loses its power leaves empty files behind."""
    (tmp_path / "launches" / "1").mkdir(parents=True)
    (tmp_path / "launches" / "1" / "launch.json").write_text(spoilt)
    supervise._compare_code(tmp_path, 2)
    assert read_events(tmp_path) == []


@pytest.mark.parametrize(("left_s", "over"), [(None, False), (3600, False), (30, True)])
def test_no_start_in_the_last_moments_of_a_job(left_s: float | None, over: bool) -> None:
    """The ranks would be told to stop while they start."""
    end = None if left_s is None else time.time() + left_s
    host = cast(Any, SimpleNamespace(end_time=lambda: end))
    assert (supervise._nearly_over(host) is not None) == over


def test_a_trainer_that_ended_without_a_word_has_a_code(tmp_path: Path) -> None:
    """Its task writes it down; the step and phase that it last told of stay."""
    note_rank(tmp_path, 1, 0)
    note_rank(tmp_path, 1, 0, code=1, error=None, lost_peer=False)
    assert (read_rank_files(tmp_path, 1)[0]["code"], read_rank_files(tmp_path, 1)[0]["phase"]) == (1, "start")


def test_a_job_with_gpus_does_not_train_on_cpus(enc: Enc, store: Path) -> None:
    """A node whose driver is broken fails at the start, and can be excluded; it does not train slowly for a night."""
    words = ["--site", "plain", "--to", "job", "launch.nproc_per_node=1", f"dataset.pre_tokenize_output={store}"]
    enc("render", "slurm", "smoke", *words)
    start = [sys.executable, "-m", "enc.encoder.run.start", "runs/smoke"]
    blind = {**enc.environment, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(start, cwd=enc.folder, env=blind, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 3
    assert "asked for GPUs, and torch sees none" in done.stderr
