"""A run on nodes of SLURM computes what the same ranks compute on one machine, on any number of nodes."""

import subprocess
import sys
from pathlib import Path

import pytest
from cluster_slurm import Slurm
from jobs import OPTIONS, Runs
from places import ROOT
from readme import blocks, make_reader
from running import exact

ENGINES = {
    "zero2": ["parallel.engine=deepspeed", "parallel.zero_stage=2"],
    "fsdp": ["parallel.engine=fsdp"],
}
FEW = [
    "trainer.max_steps=4",
    "trainer.per_device_train_batch_size=4",
    "trainer.logging_steps=1",
    "trainer.eval_strategy=no",
]


@pytest.fixture(scope="module")
def runs(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str], store: Path) -> Runs:
    return Runs(slurm, tmp_path_factory.mktemp("launch"), environment, store)


@pytest.mark.parametrize("engine", ["zero2", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_nodes_compute_what_two_local_ranks_compute(runs: Runs, engine: str) -> None:
    """On two nodes, sharded: final weights byte-identical to two ranks on this machine."""
    ready = f"dataset.pre_tokenize_output={runs.store}"
    words = ["launch", "pretrain", "smoke", ready, *OPTIONS, *FEW, *ENGINES[engine]]
    runs.enc(*words, f"trainer.output_dir={engine}-local", "--nproc", "2", "launch.scheduler=local")
    job = runs.enc(*words, f"trainer.output_dir={engine}-nodes", "--nodes", "2").stdout.strip()
    assert job.isdigit()
    last = runs.until_over(f"{engine}-nodes")
    assert last["cause"] == "finished", runs.story(f"{engine}-nodes")
    attempt = next(event for event in runs.events(f"{engine}-nodes") if event["event"] == "attempt")
    assert len(attempt["nodes"]) == 2
    assert runs.weights(f"{engine}-nodes", 4) == runs.weights(f"{engine}-local", 4)


@pytest.mark.slow
def test_a_run_goes_on_with_other_numbers_of_nodes(runs: Runs) -> None:
    """2 nodes -> 4 nodes -> 1 node by `enc resume latest --nodes M`: the same rows and masks, losses to 1e-5."""
    words = ["trainer.max_steps=100", "trainer.save_steps=50", "trainer.eval_strategy=no",
             "trainer.global_batch_size=32", "scheduler.total_steps=100"]  # fmt: skip
    runs.launch("whole", *words, "--nproc", "2", "launch.scheduler=local")
    runs.launch("moving", *words, "--nodes", "2")
    for stops, nodes in enumerate((4, 1), start=1):
        before = runs.step("moving")
        runs.until_step("moving", before + 10)
        runs.enc("cancel", "moving")
        runs.until(lambda n=stops: runs.endings("moving") == [("cancelled", "stop")] * n, "moving")
        runs.enc("resume", "latest", "--run", "moving", "--nodes", str(nodes))
    runs.until(lambda: ("finished", "stop") in runs.endings("moving"), "moving")
    attempts = [event for event in runs.events("moving") if event["event"] == "attempt"]
    assert [len(event["nodes"]) for event in attempts] == [2, 4, 1]
    whole, moving = exact(runs.enc.records("whole")), exact(runs.enc.records("moving"))
    assert moving.keys() == whole.keys()
    for step, record in whole.items():
        assert moving[step]["num_labels"] == record["num_labels"]
        assert moving[step]["tokens"] == record["tokens"]
        assert moving[step]["loss"] == pytest.approx(record["loss"], abs=1e-5)


def test_the_commands_of_the_page_about_slurm(runs: Runs, slurm: Slurm) -> None:
    """As written in its sh blocks, one after the other, by a user of the cluster."""
    reader, other = runs.folder / "reader", runs.folder / "other"
    for folder in (reader, other):
        folder.mkdir()
        make_reader(folder)
    home = runs.folder / "home"
    (home / "enc" / "sites").mkdir(parents=True)
    (home / "enc" / "sites" / "ours.yaml").write_text("# Ours.\nslurm: {partition: main, gpu_request: none}\n")
    program = home / "enc" / "enc"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "from enc.launcher.cli.app import main; main()" "$@"\n')
    program.chmod(0o755)
    variables = {**runs.enc.environment, "XDG_CONFIG_HOME": str(home)}
    variables["PATH"] = f"{program.parent}:{variables['PATH']}"
    lines = [line for block in blocks(ROOT / "docs" / "slurm.md", "sh") for line in block.splitlines()]
    assert {line.split()[0] for line in lines} == {"enc", "sbatch"}
    for line in lines:
        folder = other if line.startswith("sbatch") else reader
        words = ["sh", "-c", line]
        done = subprocess.run(
            words, cwd=folder, env=variables, capture_output=True, text=True, timeout=200, check=False
        )
        assert done.returncode in ((0, 3) if "doctor" in line else (0,)), f"{line}\n{done.stdout}\n{done.stderr}"
        if line.startswith("enc resume"):
            Runs(slurm, reader, runs.enc.environment, runs.store).until_over("runs/my")
    Runs(slurm, other, runs.enc.environment, runs.store).until_over("runs/my")


def test_a_refused_job_leaves_the_older_run(runs: Runs) -> None:
    """When sbatch says no, the run that was to be replaced is where it was, and nothing else is there."""
    runs.launch("older", "trainer.max_steps=1", "launch.scheduler=local")
    before = _files(runs.folder)
    words = ["--nodes", "1", "launch.slurm.reservation=none", "trainer.overwrite_output_dir=true"]
    refused = runs.enc("launch", "pretrain", "smoke", f"dataset.pre_tokenize_output={runs.store}",
                       "trainer.output_dir=older", *OPTIONS, *words, code=2)  # fmt: skip
    assert "The older run is back in" in refused.stderr
    assert _files(runs.folder) == before


def _files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"}
