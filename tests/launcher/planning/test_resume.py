"""Going on with a run: what was moved together is found together."""

import shutil
from pathlib import Path

import yaml
from running import Enc

from enc.launcher.planning.resume import moved_store


def test_a_run_that_was_moved_with_its_store_goes_on(enc: Enc, store: Path) -> None:
    """Its tokens and its tokenizer are looked for beside it, and nothing has to be said."""
    old, new = enc.folder / "old", enc.folder / "new"
    shutil.copytree(store, old / "stores" / "a")
    where = [f"dataset.path={old}/stores/a", "dataset.pre_tokenize_output=null", f"trainer.output_dir={old}/runs/a"]
    tokenizer = ["tokenizer.train=null", f"tokenizer.path={old}/stores/a/tokenizer"]
    steps = ["trainer.max_steps=2", "scheduler.total_steps=4", "dataset.num_workers=0", "trainer.eval_strategy=no"]
    enc("launch", "pretrain", "smoke", *where, *tokenizer, *steps)
    old.rename(new)
    done = enc("resume", "latest", "--run", "new/runs/a", "trainer.max_steps=3")
    assert f"dataset.path: '{old}/stores/a' -> '{new}/stores/a'" in done.stderr
    assert sorted(enc.records("new/runs/a")) == [1, 2, 3]


def test_only_a_store_that_was_moved_along_is_taken(tmp_path: Path, store: Path) -> None:
    """One that is where it was stays the run's, and another folder is none."""
    run = tmp_path / "new" / "runs" / "a"
    run.mkdir(parents=True)
    config = {"dataset": {"path": f"{tmp_path}/old/stores/a"}, "trainer": {"output_dir": f"{tmp_path}/old/runs/a"}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert moved_store(run) == {}
    (tmp_path / "new" / "stores").mkdir()
    (tmp_path / "new" / "stores" / "a").symlink_to(store)
    assert moved_store(run) == {"dataset.path": f"{tmp_path}/new/stores/a"}
    (tmp_path / "old" / "stores").mkdir(parents=True)
    (tmp_path / "old" / "stores" / "a").symlink_to(store)
    assert moved_store(run) == {}
