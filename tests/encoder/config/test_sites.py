"""Site profiles: where they are found, what wins over what, and what is said of their mistakes."""

import json
from pathlib import Path
from typing import Any

import pytest
from running import Enc
from scripts import CASES

from enc.encoder.config.launch import LaunchConfig
from enc.encoder.config.load import load_config
from enc.encoder.config.overrides import parse_overrides
from enc.encoder.config.sites import SITES, find_site, site_files
from enc.encoder.errors import UsageError

SITE = """\
# Our cluster.
nproc_per_node: 4
env: {A: site, B: site}
slurm:
  partition: site
  time: 10:00:00
  exclude: [n1, n2]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with site.yaml, and a home of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    (tmp_path / "site.yaml").write_text(SITE)
    return tmp_path


def launch(text: str, *words: str) -> LaunchConfig:
    Path("cfg.yaml").write_text(text)
    return load_config("cfg.yaml", parse_overrides(list(words))).config.launch


def problems(text: str, site: str, *words: str) -> str:
    Path("site.yaml").write_text(site)
    with pytest.raises(UsageError) as error:
        launch(text, "launch.site=site.yaml", *words)
    return str(error.value)


@pytest.mark.parametrize("site", CASES)
def test_built_in_sites_load_without_a_note(site: str) -> None:
    """They are whole by themselves, and their first line says what they are for, in a line of `enc config sites`."""
    assert load_config("smoke", {"launch.site": site}).warnings == []
    first = (SITES / f"{site}.yaml").read_text().splitlines()[0]
    assert first.startswith("# ")
    assert len(first) <= 65


def test_a_site_lies_under_the_file_and_the_command_line(folder: Path) -> None:
    """Key by key in mappings; a list is one value."""
    text = "launch:\n  site: site.yaml\n  env: {A: file, C: file}\n  slurm: {partition: file, exclude: []}\n"
    found = launch(text, "launch.slurm.qos=words", "launch.env.B=words")
    assert (found.nproc_per_node, found.slurm.time, found.slurm.qos) == (4, "10:00:00", "words")
    assert (found.slurm.partition, found.slurm.exclude) == ("file", [])
    assert found.env == {"A": "file", "B": "words", "C": "file"}


def test_a_site_of_the_command_line_wins_over_the_file(folder: Path) -> None:
    """But not over other values of the command line, whole sections included."""
    text = (
        "launch:\n  site: plain\n  nproc_per_node: 2\n  env: {A: file, C: file}\n  slurm: {partition: file, mem: 1G}\n"
    )
    found = launch(text, "launch.site=site.yaml", "launch.env.B=words", "launch.slurm.exclude=[n9]")
    assert (found.nproc_per_node, found.slurm.partition, found.slurm.mem) == (4, "site", "1G")
    assert found.slurm.exclude == ["n9"]
    assert found.env == {"A": "site", "B": "words", "C": "file"}
    found = launch(text, "launch.site=site.yaml", "launch.slurm={partition: words}", "launch.nproc_per_node=3")
    assert (found.nproc_per_node, found.slurm.partition, found.slurm.time) == (3, "words", "10:00:00")


def test_null_takes_a_value_of_a_site_back(folder: Path) -> None:
    assert launch("launch: {site: site.yaml, slurm: {time: null}}").slurm.time is None
    assert launch("", "launch.site=site.yaml", "launch.slurm.time=null").slurm.time is None
    assert launch("launch: {site: site.yaml}", "launch.site=null").slurm.time is None


def test_a_written_config_keeps_its_values(folder: Path) -> None:
    """A complete config.yaml that names a site is not changed by it."""
    config = load_config("smoke", {"launch.site": "site.yaml", "launch.slurm.partition": "x"}).config
    Path("whole.yaml").write_text(config.to_yaml())
    assert load_config("whole.yaml").config == config


def test_where_sites_are_looked_for(folder: Path) -> None:
    """A file first, then the user's own profiles, then the built-in ones."""
    own = folder / "home" / "enc" / "sites"
    own.mkdir(parents=True)
    assert find_site("plain") == SITES / "plain.yaml"
    (own / "plain.yaml").write_text("nproc_per_node: 3\n")
    (own / "ours.yaml").write_text("nproc_per_node: 5\n")
    assert find_site("plain") == own / "plain.yaml"
    assert launch("launch: {site: ours}").nproc_per_node == 5
    (folder / "plain").write_text("nproc_per_node: 6\n")
    assert launch("launch: {site: plain}").nproc_per_node == 6
    assert set(site_files()) == {*CASES, "ours"}


def test_an_unknown_site_names_the_known_ones(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"site profile 'pixis' .* did you mean pyxis\? Sites are: account-qos, appt"):
        launch("", "launch.site=pixis")


@pytest.mark.parametrize(
    ("site", "says"),
    [
        ("slrum: {}\n", "site.yaml:1: launch.slrum is not a key; did you mean launch.slurm?"),
        ("slurm:\n  partitoin: x\n", "site.yaml:2: launch.slurm.partitoin is not a key; did you mean"),
        ("a: 1\nnproc_per_node: 0\n", "site.yaml:2: launch.nproc_per_node is 0"),
        ("slurm.partition: x\n", "site.yaml:1: launch.slurm.partition is no key of a file in one word"),
        ("site: plain\n", "site.yaml:1: site cannot be set by a site profile"),
        ("launch: {nodes: 2}\n", "site.yaml:1: launch is no key of a site profile"),
        ("nodes: 1\nnodes: 2\n", "site.yaml:2: launch.nodes is given twice, first at site.yaml:1"),
        ("env: {RANK: a}\n", "site.yaml:1: launch.env.RANK is a variable that enc sets itself"),
        ("slurm: {continue_by: requeue,\n  rejected: [--requeue]}\n", "site.yaml:1: launch.slurm.continue_by is"),
        ("- nodes\n", "site.yaml: a site profile is a mapping"),
        ("env: [\n", "site.yaml, line 2"),
        ("env: 5\n", "site.yaml:1: launch.env is 5"),
    ],
)
def test_mistakes_of_a_site_are_shown_with_their_line(folder: Path, site: str, says: str) -> None:
    assert says in problems("", site)


def test_problems_of_config_and_site_come_together(folder: Path) -> None:
    said = problems("sead: 1\nlaunch: {env: {A: 5}}\n", "nodes: 0\n", "trainer.max_steps=0")
    assert "cfg.yaml has 4 problems" in said
    assert [line.split()[1] for line in said.splitlines()[1:]] == [
        "cfg.yaml:1:",
        "cfg.yaml:2:",
        "site.yaml:1:",
        "command",
    ]


@pytest.mark.parametrize("given", ["launch.site=5", "launch.site=''", "launch=5", "launch.site=[a]"])
def test_what_is_no_site(folder: Path, given: str) -> None:
    """Is a problem of the key, and no crash."""
    with pytest.raises(UsageError, match=r"launch"):
        launch("", given)


def test_sites_are_listed(enc: Enc, folder: Path) -> None:
    """Built-in ones, and one's own with their place."""
    enc.environment = {**enc.environment, "XDG_CONFIG_HOME": str(folder / "home")}
    own = folder / "home" / "enc" / "sites"
    own.mkdir(parents=True)
    (own / "ours.yaml").write_text("# Ours.\nnodes: 2\n")
    (own / "plain.yaml").write_text("nodes: 2\n")
    lines = enc("config", "sites").stdout.splitlines()
    assert [line.split()[0] for line in lines] == sorted([*CASES, "ours"])
    assert f"ours           Ours. [{own}/ours.yaml]" in lines
    listed: list[dict[str, Any]] = json.loads(enc("config", "sites", "--json").stdout)
    by_name = {site["name"]: site for site in listed}
    assert by_name["ours"] == {"name": "ours", "text": "Ours.", "path": str(own / "ours.yaml")}
    assert by_name["plain"]["text"] == ""
    assert by_name["gres"]["path"] == str(SITES / "gres.yaml")
    assert len(listed) == len(CASES) + 1


def test_built_in_sites_fit_into_a_terminal(enc: Enc) -> None:
    assert max(map(len, enc("config", "sites").stdout.splitlines())) <= 80
