"""`enc doctor`: what it looks at turns yellow or red for a real cause, and nothing of a hostile machine stops it."""

import json
import os
import resource
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from running import ENC, Enc

from enc.encoder.config.load import load_config
from enc.launcher.backends.slurm import probe as probe_slurm
from enc.launcher.backends.slurm.commands import Partition
from enc.launcher.checks import doctor, probe_machine, probe_software
from enc.launcher.checks.findings import Finding
from enc.launcher.checks.probe_machine import DiskSpeed, Interface
from enc.launcher.machine.facts import look
from enc.launcher.machine.gpus import InstalledGpu, ask_nvidia_smi

CFG = "dataset: {name: python-docs}\ntokenizer: {train: {vocab_size: 1024}}\n"
ALLOCATION = {"SLURM_JOB_ID": "9", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8"}


def the(findings: Any) -> Finding:
    (finding,) = findings
    return finding


def levels(findings: Any) -> list[str]:
    return [finding.level for finding in findings]


@pytest.fixture
def report(enc: Enc) -> Callable[..., dict[str, list[dict[str, str]]]]:
    """Runs `enc doctor --quick --json` with words and further variables; its findings by section."""
    (enc.folder / "cfg.yaml").write_text(CFG)

    def run(*words: str, code: int | None = None, **variables: str) -> dict[str, list[dict[str, str]]]:
        asking = Enc(enc.folder, {**enc.environment, **variables})
        parsed = json.loads(asking("doctor", *words, "--quick", "--json", code=code).stdout)
        return {section["name"]: section["findings"] for section in parsed["sections"]}

    return run


# --- the command -----------------------------------------------------------------------------------------------------


def test_json_has_every_finding_with_its_level_and_what_to_do(enc: Enc) -> None:
    done = enc("doctor", "smoke", "--quick", "--json", code=None)
    parsed = json.loads(done.stdout)
    assert set(parsed) == {"ok", "counts", "seconds", "sections"}
    findings = [finding for section in parsed["sections"] for finding in section["findings"]]
    assert all(set(finding) == {"level", "what", "text", "fix"} for finding in findings)
    assert parsed["counts"] == {
        level: sum(finding["level"] == level for finding in findings) for level in ("green", "yellow", "red")
    }
    assert parsed["ok"] == (parsed["counts"]["red"] == 0) == (done.returncode == 0)
    names = [section["name"] for section in parsed["sections"]]
    assert [*names[:2], names[-1]] == ["Software", "GPUs", "This run"]


def test_it_looks_at_the_disk_and_leaves_no_file_there(enc: Enc) -> None:
    """The whole report of a run that has no problem, in 80 columns of plain text."""
    (enc.folder / "cfg.yaml").write_text(CFG)
    done = enc("doctor", "cfg.yaml", "launch.scheduler=local", "trainer.output_dir=run", code=0)
    assert "\x1b" not in done.stdout
    assert "MB/s" in done.stdout
    assert "for a checkpoint of" in done.stdout.replace("\n        ", " ")
    assert [path.name for path in enc.folder.iterdir()] == ["cfg.yaml"]
    lines = done.stdout.splitlines()
    assert [line for line in lines if len(line) > 80 and len(line.split()) > 2] == []
    marks = {line[2:6] for line in lines if line.startswith("  ") and line[2] != " "}
    assert marks <= {"ok  ", "look", "bad "}
    assert lines[-1].endswith(" ok.")


def test_something_bad_gives_exit_code_3_and_a_bad_config_2(enc: Enc) -> None:
    (enc.folder / "cfg.yaml").write_text(CFG)
    done = enc("doctor", "cfg.yaml", "--quick", "trainer.output_dir=cfg.yaml/run", code=3)
    assert "  bad   run folder:" in done.stdout
    assert enc("doctor", "cfg.yaml", "--quick", "trainer.max_stepz=3", code=2).stdout == ""
    assert "neither an option" in enc("doctor", "--quik", "cfg.yaml", "--quik", code=2).stderr


def test_a_config_without_a_plan_is_one_bad_line(report: Callable[..., Any]) -> None:
    """The machine is looked at all the same."""
    words = ["cfg.yaml", "launch.nproc_per_node=2", "trainer.use_cpu=true", "trainer.global_batch_size=5"]
    found = report(*words, code=3)
    assert the([f["text"] for f in found["This run"]]).startswith("trainer.global_batch_size is 5 rows")
    assert "GPUs" in found


@pytest.mark.parametrize("home", ["", "/nonexistent"])
def test_a_hostile_environment_stops_nothing(enc: Enc, home: str) -> None:
    """No programs, no home, a missing SLURM_CONF, odd variables: findings, never a traceback."""
    (enc.folder / "cfg.yaml").write_text(CFG)
    bare = {"HOME": home, "PATH": "", "SLURM_CONF": "/no", "NCCL_SOCKET_IFNAME": "^=,", "CUDA_HOME": "/no", "CXX": "x",
            "COLUMNS": "0", "CUDA_VISIBLE_DEVICES": "x,,-1", "NETRC": "/proc/1/mem", "WANDB_BASE_URL": "::",
            "SLURM_JOB_ID": "?", "SLURM_JOB_NUM_NODES": "x", "TORCH_EXTENSIONS_DIR": "/proc/self/fd"}  # fmt: skip
    for words in ([], ["cfg.yaml", "wandb.enabled=true"]):
        done = subprocess.run(
            [*ENC, "doctor", "--quick", *words], cwd=enc.folder, env=bare, capture_output=True, text=True, check=False
        )
        assert done.returncode in (0, 3), done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        assert "could not be looked at" not in done.stdout
        assert "GPUs" in done.stdout


def test_ctrl_c_leaves_nothing_behind(enc: Enc) -> None:
    """Also while the disk is measured."""
    process = subprocess.Popen(
        [*ENC, "doctor"], cwd=enc.folder, env=enc.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    while not process.stdout.readline().startswith("Caches"):  # the last part before the disk
        assert process.poll() is None
    process.send_signal(2)
    out, err = process.communicate(timeout=30)
    assert process.returncode != 0
    assert "Traceback" not in out + err
    assert list(enc.folder.iterdir()) == []


# --- time limits -----------------------------------------------------------------------------------------------------


def test_a_probe_that_hangs_or_breaks_is_a_yellow_line() -> None:
    started = time.monotonic()
    hangs = doctor.Later(lambda: time.sleep(60) or [])
    assert levels(doctor._result("disk", hangs, 0.2)) == ["yellow"]
    assert time.monotonic() - started < 5
    breaks = doctor.Later(lambda: [Finding(*[1 / 0])])
    assert "ZeroDivisionError" in the(doctor._result("disk", breaks, 5)).text


def test_a_program_that_hangs_is_given_up(report: Callable[..., Any], program: Callable[[str, str], Path]) -> None:
    """nvidia-smi on a machine whose driver hangs."""
    path = program("nvidia-smi", "exec sleep 60")
    started = time.monotonic()
    found = report(PATH=f"{path.parent}:{os.environ['PATH']}")
    assert time.monotonic() - started < 20
    finding = the(found["GPUs"])
    assert finding["level"] == "yellow"
    assert "did not answer within 3 s" in finding["text"]


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str, str], Path]:
    """Makes a shell script in a folder for PATH."""

    def make(name: str, script: str) -> Path:
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    return make


# --- software --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("version", "level"), [("2.11.0", "green"), ("2.13.1+cu130", "green"), ("2.14.0", "red")])
def test_a_version_outside_of_what_is_asked_for_is_red(version: str, level: str) -> None:
    has = {"torch": version}
    found = the(probe_software.check_versions(has, [Requirement("torch>=2.11,<2.14")], has.get))
    assert found.level == level
    assert level == "green" or found.fix.startswith("pip install 'torch")


def test_a_missing_package_is_red_and_an_optional_one_is_not() -> None:
    found = probe_software.check_versions({"wandb": None}, [Requirement("datasets>=4.0")], lambda name: None)
    assert [(f.level, f.text) for f in found] == [("red", "datasets is missing"), ("green", "wandb (optional)")]


def facts(**changes: Any) -> dict[str, Any]:
    gpu = {"name": "NVIDIA H100", "capability": [9, 0], "bytes": 80 * 2**30}
    usual = {"torch": "2.13.0", "cuda": "13.0", "cuda_available": True, "cuda_said": "", "gpus": [gpu],
             "architectures": ["sm_80", "sm_90"], "nccl": "2.28.3", "flash_attn": None, "why_not": {}}  # fmt: skip
    return {**usual, **changes}


@pytest.mark.parametrize(
    ("changes", "num_gpus", "expected"),
    [
        ({}, 1, ["green"]),
        ({"cuda": None, "cuda_available": False, "gpus": [], "architectures": []}, 0, ["green"]),
        ({"cuda": None, "cuda_available": False, "gpus": []}, 1, ["red"]),
        ({"cuda_available": False, "gpus": [], "cuda_said": "The NVIDIA driver is too old"}, 1, ["red"]),
        ({"architectures": ["sm_100"]}, 1, ["green", "red"]),
        ({"architectures": ["sm_80", "compute_80"]}, 1, ["green"]),
        ({"flash_attn": "ImportError: undefined symbol"}, 1, ["green", "yellow"]),
    ],
)
def test_torch_must_be_built_for_the_gpus(changes: dict[str, Any], num_gpus: int, expected: list[str]) -> None:
    assert levels(probe_software.check_torch(facts(**changes), num_gpus)) == expected


def test_torch_that_does_not_import_is_red(report: Callable[..., Any], tmp_path: Path) -> None:
    """A broken install ends the import, not the doctor."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open')\n")
    found = report(code=3, PYTHONPATH=str(tmp_path / "broken"))
    bad = the(f for f in found["Software"] if f["what"] == "torch")
    assert bad["level"] == "red"
    assert "libcudart.so.13: cannot open" in bad["text"]
    assert "Fast paths" not in found


def test_what_torch_says_is_json() -> None:
    """The process that imports it, on this machine."""
    said = probe_software.ask_torch(120)
    assert set(said) == set(facts())
    assert said["why_not"]["attention"]
    assert levels(probe_software.check_nccl(said)) == ["green"]
    assert set(levels(probe_software.check_fast_paths(said))) == {"green"}


# --- GPUs ------------------------------------------------------------------------------------------------------------

H100 = "NVIDIA H100 80GB HBM3, 580.95.05, 81559"


@pytest.mark.parametrize(
    ("lines", "visible", "expected"),
    [
        ([f"0, {H100}, 4, 9.0", f"1, {H100}, 4, 9.0"], None, ["green"]),
        ([f"0, {H100}, 4, 9.0", f"1, {H100}, 40000, 9.0"], None, ["green", "yellow"]),
        ([f"0, {H100}, 4, 9.0", "1, NVIDIA L4, 580.95.05, 23034, 4, 8.9"], None, ["yellow"]),
        ([f"0, {H100}, 4, 9.0"], "0,1", ["green", "red"]),
        ([f"0, {H100}, 4, 9.0"], "", ["green", "yellow"]),
        (["[Insufficient Permissions]"], None, ["green"]),
    ],
)
def test_gpus_as_nvidia_smi_lists_them(
    lines: list[str],
    visible: str | None,
    expected: list[str],
    program: Callable[[str, str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its output is parsed; unequal, used and hidden GPUs are pointed out."""
    path = program("nvidia-smi", "cat <<'END'\n" + "\n".join(lines) + "\nEND")
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    assert levels(probe_software.check_gpus(ask_nvidia_smi(10), visible)) == expected


def test_a_failing_nvidia_smi_is_quoted(report: Callable[..., Any], program: Callable[[str, str], Path]) -> None:
    path = program(
        "nvidia-smi", "echo 'NVIDIA-SMI has failed because it could not communicate with the driver'; exit 9"
    )
    finding = the(report(PATH=f"{path.parent}:{os.environ['PATH']}")["GPUs"])
    assert finding["level"] == "yellow"
    assert "could not communicate with the driver" in finding["text"]


def test_gpu_memory_is_shown_in_gib() -> None:
    gpu = InstalledGpu("0", "NVIDIA H100", "580", 81559, 4, "9.0")
    text = the(probe_software.check_gpus([gpu, gpu], None)).text
    assert text == "2 x NVIDIA H100 of 80 GiB, compute capability 9.0, driver 580"


# --- network ---------------------------------------------------------------------------------------------------------

INTERFACES = [Interface("lo", True, "127.0.0.1"), Interface("eth0", True, "10.0.0.1"), Interface("ib0", False, None)]


@pytest.mark.parametrize(
    ("name", "value", "level"),
    [
        ("NCCL_SOCKET_IFNAME", "eth", "green"),
        ("NCCL_SOCKET_IFNAME", "=eth0", "green"),
        ("NCCL_SOCKET_IFNAME", "=eth", "red"),
        ("NCCL_SOCKET_IFNAME", "^docker,lo", "green"),
        ("NCCL_SOCKET_IFNAME", "^lo,eth", "red"),
        ("NCCL_SOCKET_IFNAME", "hsn0", "red"),
        ("NCCL_SOCKET_IFNAME", "ib0", "red"),
        ("GLOO_SOCKET_IFNAME", "eth0", "green"),
        ("GLOO_SOCKET_IFNAME", "eth", "red"),
    ],
)
def test_an_interface_that_is_named_must_be_there(name: str, value: str, level: str) -> None:
    """NCCL takes prefixes, exact names and exclusions, gloo whole names; compute nodes may have others."""
    *_, last = probe_machine.check_network(INTERFACES, [], {name: value}, on_nodes=False)
    assert last.level == level
    *_, last = probe_machine.check_network(INTERFACES, [], {name: value}, on_nodes=True)
    assert last.level == ("yellow" if level == "red" else "green")


def test_a_wrong_interface_in_the_environment_or_the_config_is_red(report: Callable[..., Any]) -> None:
    """On the real interfaces of this machine."""
    found = report(code=3, NCCL_SOCKET_IFNAME="nosuch9")
    assert "red" in [f["level"] for f in found["Network"]]
    found = report("cfg.yaml", "launch.scheduler=local", "launch.env.GLOO_SOCKET_IFNAME=nosuch9", code=3)
    assert "red" in [f["level"] for f in found["Network"]]
    assert {f["level"] for f in report(GLOO_SOCKET_IFNAME="lo")["Network"]} == {"green"}


def test_infiniband_that_is_switched_off_is_yellow() -> None:
    found = probe_machine.check_network(INTERFACES, ["mlx5_0 ACTIVE"], {"NCCL_IB_DISABLE": "1"}, False)
    assert levels(found) == ["green", "green", "yellow"]


# --- compilers, machine ----------------------------------------------------------------------------------------------


def test_torch_compile_needs_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert "red" not in levels(probe_software.compilers(load_config("smoke").config, look()))
    compiled = load_config("smoke", {"trainer.torch_compile": True}).config
    assert [f.what for f in probe_software.compilers(compiled, look()) if f.level == "red"] == ["C++ compiler"]


def test_a_stale_lock_is_found_without_a_config(report: Callable[..., Any], tmp_path: Path) -> None:
    lock = tmp_path / "extensions" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.write_text("")
    os.utime(lock, (time.time() - 3600, time.time() - 3600))
    found = report(TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions"))
    assert the(f["fix"] for f in found["Compilers"] if f["what"] == "build lock") == f"rm {lock}"
    both = report("cfg.yaml", TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions"))
    assert [f["what"] for section in both.values() for f in section].count("build lock") == 1


def test_few_open_files_are_yellow(enc: Enc) -> None:
    """A real limit of 1,000."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1000, 8192))

    done = subprocess.run(
        [*ENC, "doctor", "--quick"],
        cwd=enc.folder,
        env=enc.environment,
        preexec_fn=limit,
        capture_output=True,
        text=True,
    )
    assert "  look  open files: only 1,000 a process" in done.stdout


def test_limits_of_the_machine() -> None:
    assert (
        probe_machine.check_cores(4, 8, 2.0, 0.5).text
        == "4 of 8 for this process, limited to the time of 2 by a control group"
    )
    assert probe_machine.check_cores(4, 4, None, 30).level == "yellow"
    assert levels(probe_machine.check_shared_memory(64 * 2**20)) == ["yellow"]
    assert levels(probe_machine.check_shared_memory(2**34)) == []
    assert levels(probe_machine.check_locked_memory(2**16, has_fabric=True)) == ["yellow"]


# --- SLURM -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "nproc", "expected"),
    [(2, 8, ["green"]), (1, 8, ["green", "yellow"]), (2, 4, ["green", "yellow"]), (4, 16, ["green", "red", "red"])],
)
def test_a_run_inside_a_job_must_fit_into_it(nodes: int, nproc: int, expected: list[str]) -> None:
    config = load_config("smoke", {"launch.nodes": nodes, "launch.nproc_per_node": nproc}).config
    assert levels(probe_slurm.check_allocation(config, False, ALLOCATION)) == expected
    assert levels(probe_slurm.check_allocation(config, True, ALLOCATION)) == ["green"]
    assert levels(probe_slurm.check_allocation(config, False, {})) == []


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, ["green", "yellow"]),
        ({"partition": "long"}, ["yellow"]),
        ({"partition": "gpu,long"}, ["green", "yellow"]),
        ({"time": "8:00:00"}, ["green", "yellow"]),
        ({"time": "1-01"}, ["red", "yellow"]),
        ({"partition": "long", "time": "1-01"}, ["yellow"]),
        ({"partition": "lnog"}, ["red"]),
    ],
)
def test_a_partition_must_be_up_and_have_the_time(keys: dict[str, str], expected: list[str]) -> None:
    """A job that asks for more than the limit would wait for ever; without a partition it goes to the default one."""
    known = [Partition("gpu", True, "up", "1-00:00:00", 2, 4), Partition("long", False, "down", "infinite", 0, 1)]
    config = load_config("smoke", {f"launch.slurm.{key}": value for key, value in keys.items()}).config
    assert levels(probe_slurm.check_partitions(known, config)) == expected
    assert levels(probe_slurm.check_partitions(known, None)) == ["green", "yellow"]
    assert levels(probe_slurm.check_partitions([], None)) == ["yellow"]


# --- disks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("speed", "checkpoint", "expected"),
    [
        (DiskSpeed(256_000_000, 1.0, 0.2, 0.0), 3 * 10**9, ["green"]),
        (DiskSpeed(256_000_000, 1.0, 0.2, 0.0), 10**12, ["yellow"]),
        (DiskSpeed(16_000_000, 4.0, 1.0, 0.0), None, ["yellow"]),
        (DiskSpeed(256_000_000, 1.0, 0.2, 30.0), None, ["green", "yellow"]),
    ],
)
def test_slow_disks_and_wrong_clocks_are_yellow(speed: DiskSpeed, checkpoint: int | None, expected: list[str]) -> None:
    assert levels(probe_machine.check_speed(speed, "/scratch (nfs4)", checkpoint)) == expected


def test_a_disk_without_room_is_not_measured(tmp_path: Path) -> None:
    config = load_config("smoke", {"trainer.min_free_disk_gb": 1e9}).config
    found = the(probe_machine.disk_speed(tmp_path / "run", config, look()))
    assert found.level == "yellow"
    assert "not measured" in found.text
    assert list(tmp_path.iterdir()) == []


def test_colours_are_for_terminals(enc: Enc) -> None:
    """A pseudo-terminal gets them, unless NO_COLOR is set."""
    script = f"import pty; pty.spawn({[*ENC, 'doctor', '--quick']!r})"

    def shown(variables: dict[str, str]) -> str:
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=enc.folder, env=variables, capture_output=True, text=True
        )
        return done.stdout

    plain = {**enc.environment, "TERM": "xterm"}
    assert "\x1b[" not in shown(plain)
    del plain["NO_COLOR"]
    assert "\x1b[32mok  \x1b[0m" in shown(plain)
