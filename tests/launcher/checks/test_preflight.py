"""Each check of the preflight sees its real cause and says what to do about it."""

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from enc.encoder.config.launch import SlurmConfig
from enc.encoder.config.load import load_config
from enc.encoder.sizing.sizes import checkpoint_bytes
from enc.launcher.backends.registry import current_job
from enc.launcher.backends.slurm import checks as slurm
from enc.launcher.checks import environment, preflight
from enc.launcher.checks.findings import Finding
from enc.launcher.machine.build_locks import BuildLock
from enc.launcher.machine.cgroups import cgroup_cores, cgroup_memory_limit
from enc.launcher.machine.facts import look
from enc.launcher.machine.mounts import Mount, mount_of, parse_mounts, why_node_local
from enc.launcher.machine.ports import can_bind_port
from enc.launcher.planning.plan import Plan, plan_run

Make = Callable[..., Plan]
MOUNTS = [Mount("/", "ext4"), Mount("/home", "nfs4"), Mount("/scratch", "lustre"), Mount("/dev/shm", "tmpfs")]


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes the plan of the `smoke` recipe with overrides, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("SLURM_JOB_ID", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)

    def make(**keys: Any) -> Plan:
        return plan_run(load_config("smoke", {key.replace("__", "."): v for key, v in keys.items()}).config, look())

    return make


def checked(plan: Plan, for_slurm: bool) -> list[Finding]:
    """Return what is found before a launch of a plan here, or as a job."""
    of_place = slurm.slurm_checks if for_slurm else preflight.local_checks
    facts = look(current_job(os.environ))
    return [*preflight.preflight(plan, facts), *of_place(plan, facts)]


def found(plan: Plan, what: str, for_slurm: bool = False) -> list[Finding]:
    return [finding for finding in checked(plan, for_slurm) if finding.what == what]


def the(findings: Any) -> Finding:
    (finding,) = findings
    return finding


def test_a_good_run_has_nothing_bad_and_every_warning_says_what_to_do(plan: Make) -> None:
    """On this machine, and also as a job as far as that goes."""
    good = plan()
    assert [f for f in checked(good, False) if f.level != "green"] == []
    for finding in checked(good, True):
        assert finding.level == "green" or finding.fix


# --- paths -----------------------------------------------------------------------------------------------------------


def test_a_run_folder_that_cannot_be_made_is_red(plan: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    finding = the(found(plan(trainer__output_dir="file/run"), "run folder"))
    assert finding.level == "red"
    assert f"{tmp_path}/file is a file" in finding.text


def test_text_that_is_not_there_or_cannot_be_read_is_red(plan: Make, tmp_path: Path) -> None:
    finding = the(found(plan(dataset__path="no/such"), "text"))
    assert finding.level == "red"
    assert "no/such does not exist" in finding.text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_text_is_red(plan: Make, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a\n")
    (tmp_path / "text.txt").chmod(0)
    assert the(found(plan(dataset__path="text.txt"), "text")).level == "red"


def test_a_file_that_is_missing_from_the_store_is_red(plan: Make, store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "store"
    subprocess.run(["cp", "-r", str(store), str(copy)], check=True)
    ready = plan(dataset__pre_tokenize_output=str(copy))
    assert found(ready, "token store") == []
    next(copy.glob("train/*.arrow")).unlink()
    finding = the(found(ready, "token store"))
    assert finding.level == "red"
    assert "data-00000.arrow cannot be read" in finding.text


def test_a_tokenizer_folder_that_is_not_there_is_red(plan: Make) -> None:
    finding = the(found(plan(tokenizer__train=None, tokenizer__path="no/tokenizer"), "tokenizer"))
    assert finding.level == "red"
    assert "tokenizer.path" in finding.text


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/home/me/run", None),
        ("/scratch/run", None),
        ("/tmp/run", "/tmp is different on every machine"),
        ("/dev/shm/run", "/dev/shm is different on every machine"),
        ("/data/run", "/ is a local file system (ext4)"),
    ],
)
def test_node_local_paths_are_known(path: str, why: str | None) -> None:
    """A local disk tells something only where there are network file systems too."""
    assert why_node_local(Path(path), MOUNTS) == why
    alone = [Mount("/", "ext4")]
    assert why_node_local(Path("/data/run"), alone) is None


def test_local_paths_of_a_job_are_one_yellow_line_a_reason() -> None:
    paths = {"the run folder": Path("/tmp/a"), "the token store": Path("/tmp/b"), "enc itself": Path("/home/enc")}
    finding = the(slurm.check_shared(paths, MOUNTS))
    assert finding.level == "yellow"
    assert "the run folder (/tmp/a), the token store (/tmp/b)" in finding.text
    assert "enc itself" not in finding.text


def test_mounts_are_read_with_their_escapes_and_the_last_one_covers() -> None:
    mounts = parse_mounts("a / ext4 rw 0 0\nb /my\\040disk nfs4 rw 0 0\nc /x ext4 rw 0 0\nd /x lustre rw 0 0\n")
    assert mount_of(Path("/my disk/run"), mounts) == Mount("/my disk", "nfs4")
    assert mount_of(Path("/x/run"), mounts) == Mount("/x", "lustre")
    assert mount_of(Path("/xy"), mounts) == Mount("/", "ext4")


def test_a_python_or_image_that_is_not_there(plan: Make, tmp_path: Path) -> None:
    """Red where its folder is here, yellow where the folder may be on the nodes."""
    assert the(found(plan(launch__python=f"{tmp_path}/pyhton"), "python", True)).level == "red"
    assert the(found(plan(launch__python="/nodes/only/python"), "python", True)).level == "yellow"
    assert the(found(plan(launch__python="no-such-python"), "python", True)).level == "yellow"
    image = {"launch__container__kind": "pyxis", "launch__container__image": f"{tmp_path}/enc.sqsh"}
    assert the(found(plan(**image), "image", True)).level == "red"
    (tmp_path / "enc.sqsh").write_text("")
    assert found(plan(**image), "image", True) == []
    named = {**image, "launch__container__image": "nvcr.io#nvidia/pytorch:26.01-py3"}
    assert found(plan(**named), "image", True) == []


# --- disk ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("free", "existing", "level"),
    [(1.9, 0, "red"), (2.1, 0, "yellow"), (3.9, 0, "yellow"), (4.1, 0, "green"), (2.1, 3, "green"), (1.9, 3, "red")],
)
def test_disk_is_compared_with_all_checkpoints_that_will_be_kept(
    plan: Make, free: float, existing: int, level: str
) -> None:
    """Three are kept and a fourth is written beside them; those that are there already take no more room."""
    made = plan(trainer__max_steps=100, trainer__save_total_limit=3)
    one = checkpoint_bytes(made.config)
    assert preflight.check_disk(made, int(free * one), existing).level == level


@pytest.mark.parametrize(
    ("keys", "kept"),
    [
        ({"trainer__save_steps": 5, "trainer__max_steps": 12, "trainer__save_total_limit": 0}, 3),
        ({"trainer__save_steps": 5, "trainer__max_steps": 100, "trainer__save_total_limit": None}, 20),
        ({"trainer__save_steps": 5, "trainer__max_steps": 100}, 3),
        ({"trainer__save_strategy": "no", "trainer__max_steps": 100}, 1),
    ],
)
def test_the_number_of_checkpoints_that_a_run_keeps(plan: Make, keys: dict[str, Any], kept: int) -> None:
    assert preflight.checkpoints_kept(plan(**keys)) == kept


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_real_disk_that_fills_up(plan: Make, small_disk: Path) -> None:
    """Checkpoints of 1.6 MB: 4 MB take two but not three; a file of 2 MB leaves room for one."""
    made = plan(trainer__output_dir=str(small_disk / "run"))
    assert the(found(made, "disk")).level == "yellow"
    (small_disk / "file").write_bytes(b"x" * 2 * 2**20)
    assert the(found(made, "disk")).level == "red"


def test_a_disk_that_takes_no_files_is_red(plan: Make, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    finding = the(found(plan(trainer__output_dir=str(small_disk / "new" / "run")), "run folder"))
    assert finding.level == "red"
    assert f"{small_disk} does not allow it" in finding.text
    finding = the(found(plan(dataset__pre_tokenize_output=str(small_disk / "tokens")), "token store")[:1])
    assert finding.level == "red"


def test_min_free_disk_gb_is_left_free(plan: Make) -> None:
    made = plan(trainer__min_free_disk_gb=10)
    one = checkpoint_bytes(made.config)
    finding = preflight.check_disk(made, int(10e9 + one), 0)
    assert finding.level == "red"
    assert "trainer.min_free_disk_gb 10 left free" in finding.text


# --- batch and memory ------------------------------------------------------------------------------------------------


def test_fewer_rows_than_a_step_takes_is_yellow(plan: Make, store: Path) -> None:
    """The real store is larger than a batch of 4 and smaller than one of 500,000."""
    ready = {"dataset__pre_tokenize_output": str(store)}
    assert the(found(plan(**ready), "batch")).level == "green"
    finding = the(found(plan(**ready, trainer__global_batch_size=500_000), "batch"))
    assert finding.level == "yellow"
    assert "each step repeats some" in finding.text


def test_a_batch_of_awkward_divisors_is_yellow(plan: Make) -> None:
    """13 rows a rank go in microbatches of 1 where 8 would fit."""
    keys = {"trainer__global_batch_size": 13, "trainer__per_device_train_batch_size": 8}
    assert the(found(plan(**keys), "batch")).level == "yellow"
    assert the(found(plan(**keys | {"trainer__global_batch_size": 16}), "batch")).level == "green"


def test_memory_is_compared_with_the_gpu_that_the_config_names(plan: Make) -> None:
    """Green, yellow with what would fit, red when weights and moments alone are too large."""
    large = {"model__hidden_size": 4096, "model__num_attention_heads": 32, "model__intermediate_size": 16384}
    one = the(found(plan(launch__gpu="h100-80gb"), "memory", True))
    assert one.level == "green"
    assert "on each h100-80gb" in one.text
    wide = plan(**large, model__num_hidden_layers=8, launch__gpu="l4-24gb")
    assert the(found(wide, "memory", True)).level == "yellow"
    assert "`enc plan`" in the(found(wide, "memory", True)).fix
    assert the(found(plan(**large, model__num_hidden_layers=24, launch__gpu="l4-24gb"), "memory")).level == "red"


def test_memory_of_nodes_that_nobody_named_is_no_warning(plan: Make) -> None:
    finding = the(found(plan(), "memory", True))
    assert finding.level == "green"
    assert "set launch.gpu" in finding.text


def test_ram_that_a_job_asks_for_must_hold_what_is_offloaded(plan: Make) -> None:
    keys = {"parallel__engine": "deepspeed", "parallel__offload": "optimizer", "model__num_hidden_layers": 64}
    assert the(found(plan(**keys, launch__slurm__mem="64G"), "RAM", True)).level == "green"
    finding = the(found(plan(**keys, launch__slurm__mem="20M"), "RAM", True))
    assert finding.level == "yellow"
    assert "offloaded state" in finding.text


@pytest.mark.parametrize(
    ("text", "amount"), [(None, None), ("0", None), ("480G", 480 * 2**30), ("512", 2**29), ("2T", 2**41), ("1K", 1024)]
)
def test_memory_of_slurm_is_read(text: str | None, amount: int | None) -> None:
    assert slurm.memory_asked(text) == amount


def test_sharding_groups_across_machines_are_yellow() -> None:
    def levels(replicate: int, ranks: int) -> list[str]:
        keys = {"parallel.engine": "fsdp", "parallel.replicate": replicate, "launch.nproc_per_node": ranks}
        return [f.level for f in preflight.check_sharding_groups(load_config("smoke", keys).config, 16)]

    assert levels(2, 8) == levels(4, 8) == levels(1, 8) == []
    assert levels(2, 4) == ["yellow"]


# --- SLURM -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "levels"),
    [
        ({}, []),
        ({"time": "0"}, []),
        ({"time": "24:00:00"}, []),
        ({"time": "4:00"}, ["yellow"]),
        ({"time": "30", "signal_s": 1200}, ["yellow"]),
    ],
)
def test_a_time_limit_without_room_for_work(keys: dict[str, Any], levels: list[str]) -> None:
    assert [f.level for f in slurm.check_time(SlurmConfig(**keys))] == levels


def test_a_job_without_sbatch_is_red(plan: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    finding = the(found(plan(), "SLURM", True))
    assert finding.level == "red"
    assert "sbatch" in finding.text


def test_a_launch_from_inside_a_job_is_noted(plan: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert any("inside job 17" in f.text for f in found(plan(), "SLURM", True))
    assert found(plan(), "SLURM", False) == []


# --- environment ------------------------------------------------------------------------------------------------------


def test_a_stale_build_lock_is_named_with_the_command_that_removes_it(
    plan: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red for DeepSpeed, else yellow; not while it is young; and a process that holds it is named."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    lock = tmp_path / "extensions" / "py311_cpu" / "shm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.write_text("")
    assert found(plan(), "build lock") == []
    os.utime(lock, (time.time() - 7200, time.time() - 7200))
    finding = the(found(plan(), "build lock"))
    assert (finding.level, finding.fix) == ("yellow", f"rm {lock}")
    assert "2 hours old" in finding.text
    assert the(found(plan(parallel__engine="deepspeed"), "build lock")).level == "red"
    with lock.open():
        finding = the(found(plan(parallel__engine="deepspeed"), "build lock"))
        assert finding.level == "yellow"
        assert f"process {os.getpid()} is building" in finding.text


def test_a_lock_on_a_shared_disk_may_be_held_by_another_machine() -> None:
    lock = BuildLock(Path("/home/me/.cache/torch_extensions/x/lock"), 3600, None)
    finding = the(environment.check_build_locks([lock], True, MOUNTS))
    assert finding.level == "yellow"
    assert finding.fix.startswith("if no other machine is building: rm ")


def test_caches_on_a_network_file_system_are_yellow() -> None:
    folders = environment.cache_folders({"HOME": "/home/me", "TRITON_CACHE_DIR": "/dev/shm/triton"})
    levels = {f.text.split()[0]: f.level for f in environment.check_caches(folders, MOUNTS)}
    assert levels == {"TORCH_EXTENSIONS_DIR": "yellow", "HF_HOME": "yellow"}


def test_wandb_needs_a_key_or_an_entry_in_netrc(plan: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key in the environment, an entry for its host, an unreadable file."""
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    online = plan(wandb__enabled=True)
    finding = [f for f in found(online, "W&B") if "installed" not in f.text]
    assert the(finding).level == "red"
    assert "wandb login" in the(finding).fix
    (tmp_path / "netrc").write_text("machine other.example login user password x\n")
    assert [f.level for f in found(online, "W&B") if "installed" not in f.text] == ["red"]
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x\n")
    assert [f.level for f in found(online, "W&B") if "installed" not in f.text] == ["green"]
    (tmp_path / "netrc").write_text("machine\n")
    assert [f.level for f in found(online, "W&B") if "installed" not in f.text] == ["red"]
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert [f.level for f in found(online, "W&B") if "installed" not in f.text] == ["green"]
    assert [f for f in found(plan(wandb__enabled=True, wandb__mode="offline"), "W&B") if "netrc" in f.text] == []


def test_hub_names_are_noted_and_offline_is_yellow(plan: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    hub = plan(dataset__name="wikimedia/wikipedia", tokenizer__train=None)
    notes = found(hub, "hub")
    assert [f.level for f in notes] == ["green", "green"]
    assert all("without HF_TOKEN" in f.text for f in notes)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert [f.level for f in found(hub, "hub")] == ["yellow", "yellow"]
    assert found(plan(), "hub") == []


@pytest.mark.parametrize(
    ("soft", "hard", "level"), [(1024, 65536, "yellow"), (1024, 2048, "yellow"), (-1, -1, "green")]
)
def test_few_open_files_are_yellow(soft: int, hard: int, level: str) -> None:
    assert environment.check_open_files(soft, hard).level == level


def test_a_port_that_cannot_be_bound_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: socket.socket, address: object) -> None:
        raise OSError

    assert preflight.check_port(can_bind_port()).level == "green"
    monkeypatch.setattr(socket.socket, "bind", refuse)
    assert preflight.check_port(can_bind_port()).level == "red"


def test_limits_of_control_groups_are_found_from_the_own_group_up(tmp_path: Path) -> None:
    """Version 2, version 1, and none."""
    job = tmp_path / "slurm" / "job_7" / "step_0"
    job.mkdir(parents=True)
    (job / "memory.max").write_text("max\n")
    (job.parent / "memory.max").write_text("4096\n")
    (job / "cpu.max").write_text("150000 100000\n")
    assert cgroup_memory_limit("0::/slurm/job_7/step_0\n", tmp_path) == 4096
    assert cgroup_cores("0::/slurm/job_7/step_0\n", tmp_path) == 1.5
    old = tmp_path / "memory" / "job"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("2048\n")
    assert cgroup_memory_limit("4:cpu,memory:/job\n0::/\n", tmp_path) == 2048
    assert cgroup_memory_limit("0::/\n", tmp_path) is None
