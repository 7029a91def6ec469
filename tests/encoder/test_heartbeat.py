"""A rank's file tells what it does, also while its main thread waits, and how it ended."""

import json
import time
from pathlib import Path

import pytest

from enc.encoder.heartbeat import Heartbeat, rank_file, read_rank_files


def until_changed(path: Path, old: str) -> dict:
    limit = time.monotonic() + 10
    while path.read_text() == old:
        assert time.monotonic() < limit
        time.sleep(0.005)
    return json.loads(path.read_text())


def test_the_file_follows_the_main_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Phase, step and marks change; the time does even when nothing else happens."""
    monkeypatch.setenv("ENC_NODE_NAME", "n7")
    path = rank_file(tmp_path, 2, 1)
    beat = Heartbeat(path, 1, every_s=0.02)
    first = json.loads(path.read_text())
    assert (first["rank"], first["host"], first["phase"], first["marks"]) == (1, "n7", "start", 0)
    waiting = until_changed(path, path.read_text())
    assert waiting["time"] > first["time"]
    assert waiting["marks"] == 0
    beat.mark("forward")
    beat.step, beat.step_s = 12, 0.5
    beat.took(3.0)
    beat.took(2.0)
    while (now := until_changed(path, path.read_text()))["phase"] != "forward":
        pass
    assert (now["step"], now["marks"], now["step_s"], now["save_s"]) == (12, 1, 0.5, 3.0)


def test_the_last_word_stays(tmp_path: Path) -> None:
    """Nothing is written after it."""
    path = rank_file(tmp_path, 1, 0)
    beat = Heartbeat(path, 0, every_s=0.01)
    beat.mark("backward")
    beat.end(3, "Connection closed by peer", lost_peer=True)
    last = path.read_text()
    time.sleep(0.1)
    assert path.read_text() == last
    content = read_rank_files(tmp_path, 1)[0]
    assert (content["phase"], content["last_phase"], content["code"]) == ("ended", "backward", 3)
    assert content["lost_peer"]


def test_files_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    """A watcher sees the others."""
    Heartbeat(rank_file(tmp_path, 1, 0), 0, every_s=60).end(0)
    rank_file(tmp_path, 1, 1).write_text('{"rank": 1, "ho')
    rank_file(tmp_path, 1, 0).with_name("notes.json").write_text("{}")
    assert list(read_rank_files(tmp_path, 1)) == [0]
