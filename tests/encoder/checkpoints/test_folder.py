"""Checkpoint folders: complete or not there, damage is found, the right ones are kept."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from places import TESTS
from running import Enc

from enc.encoder.checkpoints.folder import (
    _manifest_text,
    find_checkpoint,
    list_checkpoints,
    newest_complete,
    prune,
    remove_leftovers,
    verify,
    write_manifest,
)
from enc.encoder.errors import UsageError


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str], store: Path) -> Path:
    """A finished run of two ranks with the checkpoints 2, 4, 6."""
    enc = Enc(tmp_path_factory.mktemp("finished"), environment)
    options = [f"dataset.pre_tokenize_output={store}", "trainer.output_dir=run", "trainer.max_steps=6",
               "trainer.save_steps=2", "trainer.eval_strategy=no", "launch.nproc_per_node=2"]  # fmt: skip
    enc("launch", "pretrain", "smoke", *options)
    return enc.folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it that may be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def flip_bit(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    place = rng.randrange(len(data))
    data[place] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def test_every_flipped_bit_is_found(run: Path) -> None:
    """300 single-bit flips in any file of a checkpoint, the manifest included."""
    rng = random.Random(0)
    folder = run / "checkpoints" / "6"
    for number in range(300):
        path = files(folder)[number % len(files(folder))]
        whole = path.read_bytes()
        flip_bit(path, rng)
        status = verify(folder)
        assert status.state == "damaged", path
        assert path.name in status.problems[0]
        path.write_bytes(whole)
    assert verify(folder).state == "complete"


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "renamed", "extra"])
def test_damaged_files_are_found_and_passed_over(run: Path, damage: str) -> None:
    """Each kind of damage makes the folder damaged, and the one before it the latest."""
    folder = run / "checkpoints" / "6"
    path = folder / "model.safetensors"
    match damage:
        case "truncated":
            path.write_bytes(path.read_bytes()[:-1])
        case "empty":
            path.write_bytes(b"")
        case "missing":
            path.unlink()
        case "renamed":
            path.rename(folder / "model2.safetensors")
        case "extra":
            (folder / "notes.txt").write_text("hello")
    assert verify(folder).state == "damaged"
    found, passed_over = newest_complete(run)
    assert found == run / "checkpoints" / "4"
    assert [status.step for status in passed_over] == [6]


def test_without_a_manifest_a_folder_is_unverifiable(run: Path) -> None:
    folder = run / "checkpoints" / "6"
    (folder / "manifest.json").unlink()
    assert verify(folder).state == "unverifiable"
    with pytest.raises(UsageError, match="unverifiable"):
        find_checkpoint(run, "6")


def test_unfinished_folders_are_never_found(run: Path) -> None:
    """A temporary folder is no checkpoint, and the next clean-up removes it."""
    shutil.copytree(run / "checkpoints" / "6", run / "checkpoints" / ".8.tmp")
    assert newest_complete(run)[0] == run / "checkpoints" / "6"
    remove_leftovers(run)
    assert not (run / "checkpoints" / ".8.tmp").exists()


def test_a_checkpoint_that_was_being_replaced_comes_back(run: Path) -> None:
    """A kill between the two renames of a replacement leaves two hidden folders; the older one returns."""
    folder = run / "checkpoints"
    shutil.copytree(folder / "6", folder / ".6.tmp")
    (folder / "6").rename(folder / ".6.replaced")
    remove_leftovers(run)
    assert newest_complete(run)[0] == folder / "6"
    assert not list(folder.glob(".*"))


def test_going_back_leaves_the_later_checkpoints_aside(run: Path, environment: dict[str, str]) -> None:
    """After a resume from an older step `latest` is the new way, and retention counts only that one."""
    enc = Enc(run.parent, environment)
    words = ["--run", "run", "trainer.max_steps=5", "trainer.save_steps=1", "trainer.save_total_limit=2"]
    done = enc("resume", "2", *words, "--allow-change")
    assert "set aside: 4.abandoned-1, 6.abandoned-1" in " ".join(done.stderr.split())
    assert [path.name for path in list_checkpoints(run)] == ["4", "5"]
    assert verify(run / "checkpoints" / "6.abandoned-1").state == "complete"
    assert "checkpoints/5." in enc("resume", "latest", "--run", "run").stderr


def test_folders_with_odd_digits_are_no_checkpoints(run: Path) -> None:
    (run / "checkpoints" / "²").mkdir()
    assert [path.name for path in list_checkpoints(run)] == ["2", "4", "6"]
    manifest = _manifest_text({"format": 1, "step": 6})
    (run / "checkpoints" / "6" / "manifest.json").write_text(manifest)
    assert verify(run / "checkpoints" / "6").state == "damaged"


def test_prune_keeps_the_newest(run: Path) -> None:
    deleted = prune(run, 2)
    assert [path.name for path in deleted] == ["2"]
    assert [path.name for path in list_checkpoints(run)] == ["4", "6"]
    assert prune(run, 0) == []


def test_prune_keeps_the_last_healthy_one(run: Path) -> None:
    """When the newest checkpoints have a non-finite loss, the last finite one stays beside them."""
    for step in ("4", "6"):
        folder = run / "checkpoints" / step
        state = json.loads((folder / "trainer_state.json").read_text())
        (folder / "trainer_state.json").write_text(json.dumps({**state, "loss_is_finite": False}))
        (folder / "manifest.json").unlink()
        write_manifest(folder, int(step))
    assert prune(run, 1) == [run / "checkpoints" / "4"]
    assert [path.name for path in list_checkpoints(run)] == ["2", "6"]


def test_damaged_ones_do_not_count_as_kept(run: Path) -> None:
    """A damaged newest checkpoint is neither deleted nor counted."""
    (run / "checkpoints" / "6" / "model.safetensors").write_bytes(b"")
    prune(run, 1)
    assert [path.name for path in list_checkpoints(run)] == ["4", "6"]


def test_a_checkpoint_holds_no_pickle(run: Path) -> None:
    """Every file is JSON, YAML, text or safetensors."""
    assert {path.suffix for path in files(run / "checkpoints" / "6")} <= {".json", ".yaml", ".safetensors", ".txt"}


def test_fifty_kills_during_saves(tmp_path: Path) -> None:
    """A process that only saves is killed at 50 drawn file operations: what is there is whole and the newest."""
    script = TESTS / "support" / "kill_saves.py"
    words = [sys.executable, str(script), str(tmp_path / "run"), "50"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["during_a_save"] >= 30
    assert found["newest"] == found["last"] > 20
    assert found["left"] == [], "the next save cleans up"


def test_sigkill_of_a_run_never_leaves_a_half_written_one(enc: Enc, smoke: Callable[..., list[str]]) -> None:
    """A run of two ranks that saves at every step is killed three times, at moments when it is saving."""
    rng = random.Random(5)
    options = [
        "trainer.max_steps=100000",
        "trainer.save_steps=1",
        "trainer.eval_strategy=no",
        "trainer.logging_steps=50",
        "launch.nproc_per_node=2",
    ]
    run = enc.folder / "run"
    for number in range(3):
        words = smoke("run", *options) if number == 0 else ["resume", "latest", "--run", "run"]
        before = newest_complete(run)[0]
        process = enc.start(*words)
        limit = time.monotonic() + 120
        while newest_complete(run)[0] == before and time.monotonic() < limit:
            time.sleep(0.01)
        while not list((run / "checkpoints").glob(".*.tmp")) and time.monotonic() < limit:
            pass
        time.sleep(rng.random() * 0.03)
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(0.5)  # the trainer dies with its parent
        assert all(verify(p).state == "complete" for p in list_checkpoints(run))
        assert len(list_checkpoints(run)) >= 1
    enc("resume", "latest", "--run", "run", f"trainer.max_steps={_last(run) + 2}", "--allow-change")
    assert not list((run / "checkpoints").glob(".*"))


def _last(run: Path) -> int:
    return int(list_checkpoints(run)[-1].name)
