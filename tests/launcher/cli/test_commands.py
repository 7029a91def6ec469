"""The command line helps: other tools' names, help that fits, completion, a config of one's own."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from running import Enc
from typer.main import get_command

from enc.encoder.config.sites import RECIPES
from enc.launcher.cli import complete
from enc.launcher.cli.app import app
from enc.launcher.cli.groups import MEANT


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["train", "my.yaml"], "enc launch pretrain CFG"),
        (["export"], "enc ckpt export …"),
        (["tokenize_dataset", "--dataset", "x"], "enc preprocess CFG"),
        (["config", "cp", "smoke"], "enc config copy RECIPE my.yaml"),
        (["launch", "train", "x"], "enc launch pretrain CFG"),
        (["ckpt", "list"], "enc ckpt ls RUN"),
    ],
)
def test_names_that_people_try_are_answered(enc: Enc, words: list[str], meant: str) -> None:
    """A command of another tool, or one of ours in another place, is answered by the command that does it."""
    assert f"Did you mean `{meant}`?" in enc(*words, code=2).stderr


@pytest.mark.parametrize("meant", sorted(set(MEANT.values())))
def test_hints_name_commands_that_exist(enc: Enc, meant: str) -> None:
    words = [word for word in meant.split()[1:] if word.islower() and not re.search(r"[.…]", word)]
    enc(*words[:2] if words != ["resume", "latest"] else ["resume"], "--help")


def test_help_is_grouped_and_fits_80_columns(enc: Enc) -> None:
    """Panels in the order of a day's work; no option's name is cut."""
    page = enc("--help").stdout
    places = [page.index(f"─ {panel} ─") for panel in ("Run", "Prepare", "Afterwards")]
    assert places == sorted(places)
    assert page.index("launch ") < page.index("resume ")
    for words in (["launch", "pretrain"], ["resume"], ["plan"], ["doctor"], ["ckpt", "export"], ["report"]):
        page = enc(*words, "--help").stdout
        assert all(len(line) <= 80 for line in page.splitlines())
        assert not re.search(r"--[a-z-]*…", page), words


def test_an_option_keeps_its_other_names(enc: Enc) -> None:
    plans = [enc("plan", "smoke", name, "2").stdout for name in ("--nproc", "--nproc-per-node", "--gpus-per-node")]
    assert plans[0] == plans[1] == plans[2] != enc("plan", "smoke", "--nproc", "1").stdout


def test_a_recipe_is_copied_with_its_comments(enc: Enc) -> None:
    """The file is the recipe's, byte for byte; one that is there is never written over."""
    for recipe in RECIPES.glob("*.yaml"):
        name = f"{recipe.stem}-mine.yaml"
        assert enc("config", "copy", recipe.stem, name).stdout == f"{name}\n"
        assert (enc.folder / name).read_bytes() == recipe.read_bytes()
    (enc.folder / "smoke-mine.yaml").write_text("mine")
    assert "File exists" in enc("config", "copy", "smoke", "smoke-mine.yaml", code=2).stderr
    assert (enc.folder / "smoke-mine.yaml").read_text() == "mine"
    assert "did you mean smoke?" in enc("config", "copy", "smoky", "x.yaml", code=2).stderr
    assert not (enc.folder / "x.yaml").exists()


def test_words_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes, files, runs, checkpoints and keys."""
    (tmp_path / "runs" / "a" / "checkpoints" / "30").mkdir(parents=True)
    for name in ("config.yaml", "events.jsonl"):
        (tmp_path / "runs" / "a" / name).touch()
    (tmp_path / "smart.yml").touch()
    monkeypatch.chdir(tmp_path)
    assert complete.configs("sm") == ["smoke", "smart.yml"]
    assert complete.configs("runs/a/c") == ["runs/a/checkpoints/", "runs/a/config.yaml"]
    assert complete.runs("r") == ["runs/a"]
    assert complete.checkpoints("runs/") == ["runs/a", "runs/a/best", "runs/a/checkpoints/30"]
    assert complete.resumable("") == ["latest", "best", "runs/a/checkpoints/30"]
    assert complete.keys("optim") == ["optimizer."]
    assert complete.keys("--optimizer.l") == ["--optimizer.lr="]
    assert complete.keys("nonsense.") == []


def test_the_shell_is_offered_them(enc: Enc) -> None:
    """A command with a config offers recipes first and keys after them."""
    lines = {"enc launch pretrain quic": "quickstart", "enc resume latest trainer.max_st": "max_steps="}
    for line, offered in lines.items():
        words = {"_ENC_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
        command, environment = Path(sys.executable).with_name("enc"), {**enc.environment, **words}
        done = subprocess.run([command], env=environment, cwd=enc.folder, capture_output=True, text=True, timeout=60)
        assert offered in done.stdout


def test_every_checkpoint_and_run_is_completed() -> None:
    """No argument that names a run or a checkpoint is left without completion."""
    found = []

    def visit(command: object, path: str) -> None:
        for name, below in getattr(command, "commands", {}).items():
            visit(below, f"{path} {name}")
        for parameter in getattr(command, "params", []):
            if (parameter.metavar or "") in ("CFG", "CKPT", "RUN", "[RUN]...", "WHICH", "RECIPE"):
                found.append(path)
                assert parameter._custom_shell_complete or parameter.name == "out", path

    visit(get_command(app), "")
    assert len(found) > 10
