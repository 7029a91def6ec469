"""Documentation: every command in it runs, every command of the program appears in it, every recipe loads."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT
from readme import PAGES, blocks, make_reader
from running import Enc
from typer.main import get_command

from enc.encoder.config.load import load_config
from enc.encoder.config.sites import RECIPES
from enc.launcher.cli.app import app

README = ROOT / "README.md"
SMALL = [
    "model.hidden_size=64",
    "model.intermediate_size=128",
    "model.num_hidden_layers=2",
    "tokenizer.train.vocab_size=2048",
]
TESTED_PAGES = [
    "README.md",
    "docs/training.md",
    "docs/parallel.md",
    "docs/checkpoints.md",
    "docs/mpnet.md",
    "docs/slurm.md",
    "docs/measuring.md",
    "docs/troubleshooting.md",
]


def commands(page: Path) -> list[list[str]]:
    """Return the words of every command in a page's bash blocks."""
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def enc_commands(page: Path) -> list[list[str]]:
    """Return the commands of a page that start with `enc`, of which there must be some; make is run by CI itself."""
    assert all(words[0] in ("enc", "make") for words in commands(page))
    found = [words for words in commands(page) if words[0] == "enc"]
    assert found
    return found


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Enc:
    """The folder of the README, where its commands have run."""
    folder = tmp_path_factory.mktemp("reader")
    make_reader(folder)
    (folder / "texts.txt").write_text("A document a line.\nAnother one.\n")
    enc = Enc(folder, environment)
    for words in enc_commands(README):  # the other pages work in a folder with the run of the README
        enc(*words[1:])
    return enc


@pytest.mark.parametrize("name", TESTED_PAGES)
def test_every_command_of_a_page_runs(reader: Enc, name: str) -> None:
    """As written, one after the other, but that models are smaller; those of the README have run already."""
    for words in enc_commands(ROOT / name) if name != README.name else ():
        a_recipe = words[1] == "launch" and (RECIPES / f"{words[3]}.yaml").exists()
        reader(*words[1:], *SMALL if a_recipe else ())


def test_the_readme_loads_its_export(reader: Enc) -> None:
    """The Python lines of the README, in the folder where its commands ran."""
    code = blocks(ROOT / "README.md", "python")[0].replace("runs/my", str(reader.folder / "runs" / "my"))
    names: dict[str, object] = {}
    exec(code, names)
    assert names["model"].config.vocab_size == len(names["tokenizer"])  # type: ignore[attr-defined, arg-type]


def all_commands() -> list[str]:
    """Return every command path of the program, e.g. `ckpt export`."""
    found = []

    def walk(command, path: list[str]) -> None:
        inner = getattr(command, "commands", None)
        if inner is None:
            found.append(" ".join(path))
        for name, child in (inner or {}).items():
            walk(child, [*path, name])

    walk(get_command(app), [])
    return found


@pytest.mark.parametrize("command", all_commands())
def test_every_command_appears_in_the_docs(command: str) -> None:
    """As a command: in a block of commands, or written as code."""
    words = ["enc", *command.split()]
    spans = [span.split() for page in PAGES for span in re.findall(r"`(enc [^`]+)`", page.read_text())]
    shown = [*spans, *(line for page in PAGES for line in commands(page))]
    assert any(found[: len(words)] == words for found in shown)


def test_the_page_of_commands_is_that_of_the_program() -> None:
    """Every command and option as `make docs` writes them, whatever else another Typer would write."""
    words = [sys.executable, "-m", "typer", "enc.launcher.cli.app", "utils", "docs", "--name", "enc"]
    made = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    names = [
        re.findall(r"^(?:#+ |\* )`.*?`", text, flags=re.M)
        for text in (made, (ROOT / "docs" / "commands.md").read_text())
    ]
    assert names[0][1:] == names[1]


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_recipes_load_without_a_note(recipe: str) -> None:
    """Recipes are valid and their first line says what they are for."""
    assert load_config(recipe).warnings == []
    assert (RECIPES / f"{recipe}.yaml").read_text().startswith("# ")


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_benchmark_page_is_in_the_table() -> None:
    """What was measured can be found from the README of the folder, and no line of it leads nowhere."""
    folder = ROOT / "docs" / "benchmarks"
    listed = re.findall(r"^\| [\d-]+ \| \[([^\]]+)\]", (folder / "README.md").read_text(), flags=re.M)
    assert sorted(listed) == sorted(page.name for page in folder.glob("*.md") if page.name != "README.md")
