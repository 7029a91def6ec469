"""`enc doctor` with a real SLURM: one that answers, one that does not, and from inside a job."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_slurm import NODES, Slurm
from running import Enc

CFG = "launch: {scheduler: slurm}\ndataset: {name: python-docs}\ntokenizer: {train: {vocab_size: 1024}}\n"


@pytest.fixture
def enc(tmp_path: Path, environment: dict[str, str], slurm: Slurm) -> Enc:
    (tmp_path / "cfg.yaml").write_text(CFG)
    found = {key: slurm.variables[key] for key in ("SLURM_CONF", "PATH")}
    return Enc(tmp_path, {**environment, **found})


@pytest.fixture
def lost_slurm(tmp_path_factory: pytest.TempPathFactory, slurm: Slurm) -> Iterator[Slurm]:
    """A SLURM whose controller has gone away."""
    cluster = Slurm(tmp_path_factory.mktemp("lost"))
    cluster.daemons["slurmctld"].terminate()
    cluster.daemons["slurmctld"].wait(20)
    yield cluster
    for name in NODES:
        cluster.fail_node(name)
    cluster.daemons["munged"].terminate()
    for daemon in cluster.daemons.values():
        daemon.wait(20)


def findings(enc: Enc, section: str, *words: str, code: int | None = None) -> list[dict[str, str]]:
    report = json.loads(enc("doctor", *words, "--quick", "--json", code=code).stdout)
    return next(part["findings"] for part in report["sections"] if part["name"] == section)


def test_partitions_are_shown_with_limits_and_nodes(enc: Enc) -> None:
    """What a user needs to choose a partition."""
    assert findings(enc, "SLURM") == [
        {"level": "green", "what": "partition", "text": "main, the default: no time limit, 4 nodes, 4 idle", "fix": ""}
    ]


def test_a_partition_that_is_not_there_or_too_small_is_bad(enc: Enc) -> None:
    found = findings(enc, "SLURM", "cfg.yaml", "launch.slurm.partition=gpu", code=3)
    assert [(f["level"], f["fix"]) for f in found] == [("red", "use one of main")]
    found = findings(enc, "SLURM", "cfg.yaml", "launch.slurm.partition=main", "launch.nodes=5", code=3)
    assert found[0]["level"] == "red"
    assert "4 nodes, 4 idle, but launch.nodes is 5" in found[0]["text"]


def test_a_controller_that_does_not_answer_is_bad_for_a_job_only(enc: Enc, lost_slurm: Slurm) -> None:
    """It is said within the time limit, in a sentence."""
    enc.environment["SLURM_CONF"] = lost_slurm.variables["SLURM_CONF"]
    for words, level in ((["cfg.yaml"], "red"), ([], "yellow")):
        (found,) = findings(enc, "SLURM", *words, code=3 if level == "red" else None)
        assert found["level"] == level
        assert "cannot be reached" in found["text"] or "did not answer" in found["text"]
        assert found["fix"]


def test_inside_a_job_the_config_is_compared_with_the_allocation(enc: Enc, slurm: Slurm) -> None:
    """The batch script of a job of two nodes runs the real command."""
    script = "from enc.launcher.cli.app import main; main()"
    (enc.folder / "job.sh").write_text(
        f"#!/bin/sh\ncd {enc.folder}\n{sys.executable} -c '{script}' doctor cfg.yaml launch.scheduler=local "
        "launch.nproc_per_node=1 --quick --json > report.json\ntrue\n"
    )
    slurm("sbatch", "--wait", "-N2", "--ntasks-per-node=2", f"--output={enc.folder}/log", str(enc.folder / "job.sh"))
    report = json.loads((enc.folder / "report.json").read_text())
    texts = [f for part in report["sections"] if part["name"] == "SLURM" for f in part["findings"]]
    found = {f["text"]: f for f in texts if f["what"] == "allocation"}
    assert any("has 2 nodes with 2 GPU or tasks each" in text for text in found)
    assert any(f["level"] == "yellow" and f["fix"] == "set launch.nodes 2" for f in found.values())
    assert any(f["level"] == "yellow" and f["fix"] == "set launch.nproc_per_node 2" for f in found.values())
