"""SLURM's commands, played: a controller that is away for a while, and one that refuses."""

import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from enc.encoder.errors import UsageError
from enc.encoder.events import Event, append_event
from enc.launcher.backends.queue import JobScript, hand_over
from enc.launcher.backends.registry import find_jobs
from enc.launcher.backends.slurm import commands as slurm
from enc.launcher.run_folder.lock import RunLock


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that comes first in PATH."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(slurm, "_PAUSE_S", 0.01)
    return tmp_path


def command(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\necho x >> {folder}/calls\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)


AWAY = [
    "Unable to contact slurm controller (connect failure)",
    "slurm_get_job_steps error: Socket timed out on send/recv operation",
]


@pytest.mark.parametrize("said", AWAY)
def test_a_controller_that_is_away_is_asked_again(commands: Path, said: str) -> None:
    """The next job is had once it is back: one call in three is answered."""
    answered = f"[ $(wc -l < {commands}/calls) -ge 3 ] && exit 0"
    command(commands, "scontrol", f"{answered}\necho '{said}' >&2\nexit 1")
    slurm.patiently(lambda: slurm.requeue("7"))
    assert (commands / "calls").read_text() == "x\n" * 3


def test_a_refusal_is_final(commands: Path) -> None:
    """What SLURM refuses is not asked for twice."""
    command(commands, "scontrol", "echo 'Requested operation is presently disabled' >&2; exit 1")
    with pytest.raises(UsageError, match="presently disabled"):
        slurm.patiently(lambda: slurm.requeue("7"))
    assert (commands / "calls").read_text() == "x\n"


def test_the_copy_of_the_code_is_there_before_the_job(tmp_path: Path) -> None:
    """A job that starts at once imports the supervisor from it."""
    config = SimpleNamespace(launch=SimpleNamespace(snapshot_code=True))
    plan = cast(Any, SimpleNamespace(config=config, run_dir=tmp_path))

    def sbatch(_script: Path) -> str:
        assert (tmp_path / "code" / "enc" / "launcher" / "supervise" / "__main__.py").is_file()
        raise UsageError("sbatch refused it")

    with pytest.raises(UsageError, match="refused"):
        hand_over(plan, JobScript("job.sbatch", "", sbatch, slurm.cancel))
    assert list(tmp_path.iterdir()) == []


def test_a_run_belongs_to_the_job_that_is_to_follow(commands: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The lock names the job that has ended; the events name the one that it submitted."""
    run_dir = tmp_path_factory.mktemp("run")
    command(commands, "sbatch", "exit 1")
    command(commands, "squeue", "echo '19|PENDING|BeginTime|0:00|10:00|N/A||2|19|19'")
    append_event(run_dir, Event.SUBMITTED, job="18", **dict.fromkeys(Event.SUBMITTED.fields[1:]))
    lock = RunLock(run_dir, find_jobs, job="18")
    append_event(run_dir, Event.CONTINUED, job="19", after="18")
    lock.release()
    with pytest.raises(UsageError, match="belongs to job 19, which is pending"):
        RunLock(run_dir, find_jobs)


def test_an_outer_job_leaves_nothing_in_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is submitted from inside an allocation gets the user's variables, not the allocation's."""
    for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SBATCH_PARTITION", "SRUN_CPUS_PER_TASK", "ENC_ATTEMPT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm/slurm.conf")
    monkeypatch.setenv("HF_TOKEN", "mine")
    kept = slurm.outer_environment()
    assert not {"SLURM_JOB_ID", "SLURM_NTASKS", "SBATCH_PARTITION", "SRUN_CPUS_PER_TASK", "ENC_ATTEMPT"} & kept.keys()
    assert (kept["SLURM_CONF"], kept["HF_TOKEN"]) == ("/etc/slurm/slurm.conf", "mine")
