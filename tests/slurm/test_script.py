"""Job scripts through the real sbatch, slurmd and srun: what they are given arrives, or was refused."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cluster_slurm import Slurm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripts import CASES
from scripts import config_of as config_of_site

from enc.encoder.config.schema import RunConfig
from enc.encoder.errors import UsageError
from enc.launcher.backends.slurm.script import job_script

NAMES = [
    "plain", "a b", " a", "a ", "a\tb", "it's", 'say "x"', "'", '"', "a#b", "#", "50%", "%j", "%%", "%5j%", "$(id)",
    "`id`", "$HOME", "a,b", "a=b", "a:b", ":", "a;b", "a&b", "a|b", "*", "?", "[1-3]", "{a,b}", "!", "~", "-a",
    "--nodes=9", "(x)", "<x>", "äöü", "漢字", "😀", "a\u2028b", "a\xa0b", "a\rb", "\x01\x1b\x7f", "\x0b\x0c",
    "x" * 200, "'\"%\" # $x",
]  # fmt: skip
IMPOSSIBLE = ["a\\b", "\\", "a\nb", "a\n#SBATCH --nodes=9\nb", "a\0b"]

PROBE = """\
#!{python} -S
# Stands for Python: as the batch process it starts what follows --, as a rank it notes what it was given.
import json, os, sys
if "enc.launcher.supervise" in sys.argv:
    words = sys.argv[sys.argv.index("--") + 1 :]
    os.execvp(words[0], words)
found = {{"argv": sys.argv[1:], "cwd": os.getcwd(), "environ": dict(os.environ)}}
with open({output!r} + "." + os.environ["SLURM_PROCID"], "w", encoding="utf-8") as file:
    json.dump(found, file)
"""


def config_of(**more: Any) -> RunConfig:
    """Return the config of a run on CPUs; keys are those of the section launch, with __ for dots."""
    updates = {f"launch.{key.replace('__', '.')}": value for key, value in more.items()}
    return RunConfig().changed({"trainer.use_cpu": True, **updates})


def submit(slurm: Slurm, folder: Path, text: str, *options: str) -> str:
    path = folder / "job.sbatch"
    path.write_bytes(text.encode())
    return slurm("sbatch", "--parsable", *options, str(path)).strip()


def fields(slurm: Slurm, job: str) -> dict[str, str]:
    """Return what SLURM holds of a job; a value goes to the end of its line."""
    done = subprocess.run(["scontrol", "show", "job", job], env=slurm.variables, capture_output=True, check=True)
    lines = [line.removeprefix("   ").partition("=") for line in done.stdout.decode().split("\n")]
    first, _, name = lines[0][2].partition(" JobName=")
    account = next(line for line in done.stdout.decode().split("\n") if " Account=" in line)
    return {"JobId": first, "JobName": name, "account line": account, **{key: value for key, _, value in lines[1:]}}


def until_ended(slurm: Slurm, *jobs: str) -> None:
    for _ in range(600):
        if not slurm("squeue", "-h", "-t", "PD,R,CG,CF", "-j", ",".join(jobs)):
            return
        time.sleep(0.1)
    raise AssertionError(slurm("squeue", "-l"))


def held(slurm: Slurm, folder: Path, name: str) -> dict[str, str]:
    """Submit a held job whose run folder, account and comment are `name`; return what became of it."""
    config = config_of(slurm__account=name, slurm__directives=[f"--comment={name}", "--export=NONE"])
    job = submit(slurm, folder, job_script(config, folder / "runs" / name, folder, sys.executable), "--hold")
    found = fields(slurm, job)
    slurm("scancel", job)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_names_arrive_through_directives(slurm: Slurm, tmp_path: Path, name: str) -> None:
    """As job name, in the path of the log, as account (SLURM writes it small) and as the value of a user's option.

    scontrol shows `%%` in a path in its own way; where the log of such a job lies is looked at below.
    """
    found = held(slurm, tmp_path, name)
    assert "%" in name or found["StdOut"] == f"{tmp_path}/runs/{name}/logs/slurm-{found['JobId']}.log"
    assert found["JobName"] == name
    assert found["Comment"] == f"{name} "  # scontrol adds the space
    assert f" Account={name.lower()} QOS=" in found["account line"]


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(name=st.text(alphabet=" '\"$`\\#%;,:=@-\n\t\r\x01äß漢😀\u2028aA0.", min_size=1, max_size=12))
def test_any_name_arrives_or_is_refused(slurm: Slurm, tmp_path: Path, name: str) -> None:
    """Refused are backslash and line break, which the path of a log cannot have."""
    if name in (".", ".."):
        return
    try:
        found = held(slurm, tmp_path, name)
    except UsageError:
        assert "\\" in name or "\n" in name
        return
    assert found["JobName"] == name


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_sbatch_cannot_take_is_refused(tmp_path: Path, name: str) -> None:
    """With the key and the path, before there is a script."""
    with pytest.raises(UsageError, match=r"trainer\.output_dir"):
        job_script(config_of(), tmp_path / name, tmp_path, sys.executable)


def test_the_longest_path_that_is_not_refused_is_accepted(slurm: Slurm, tmp_path: Path) -> None:
    """SLURM has its own limit; ours is below it."""
    run_dir = Path(f"{tmp_path}/{'x/' * 500}"[:999])
    script = job_script(config_of(), run_dir, tmp_path, sys.executable)
    slurm("scancel", submit(slurm, tmp_path, script, "--hold"))
    with pytest.raises(UsageError, match="Shorten it"):
        job_script(config_of(), run_dir / "xxx", tmp_path, sys.executable)


def test_hostile_values_reach_the_ranks_of_real_jobs(slurm: Slurm, tmp_path: Path) -> None:
    """Run folder, working folder and environment, in each of a job's two ranks; and the log is where it should be."""
    jobs, places = {}, {}
    for number, name in enumerate(NAMES):
        folder = tmp_path / str(number)
        run_dir, cwd = folder / "runs" / name, folder / "work" / name
        (run_dir / "logs").mkdir(parents=True)
        cwd.mkdir(parents=True)
        probe = folder / f"python {name[:20]}"
        probe.write_text(PROBE.format(python=sys.executable, output=str(folder / "found")))
        probe.chmod(0o755)
        config = config_of(env={"V": name, "W": f"\n{name}\r\n"}, nproc_per_node=2, slurm__srun=["--overcommit"])
        jobs[name] = submit(slurm, folder, job_script(config, run_dir, cwd, str(probe)))
        places[name] = (folder, run_dir, cwd)
    until_ended(slurm, *jobs.values())
    for name, (folder, run_dir, cwd) in places.items():
        log = run_dir / "logs" / f"slurm-{jobs[name]}.log"
        assert [path.name for path in log.parent.iterdir()] == [log.name], name
        for rank in range(2):
            assert (folder / f"found.{rank}").exists(), f"{name!r}: {log.read_text()}"
            found = json.loads((folder / f"found.{rank}").read_text())
            assert found["argv"] == ["-P", "-m", "enc.launcher.rank", str(run_dir)]
            assert found["cwd"] == str(cwd)
            assert (found["environ"]["V"], found["environ"]["W"]) == (name, f"\n{name}\r\n")


def test_a_job_is_what_the_config_asks_for(slurm: Slurm, tmp_path: Path) -> None:
    """Nodes, tasks, cores, memory, time, excluded nodes, dependency, signal, requeue, further options."""
    more = {"slurm.cpus_per_task": 1, "slurm.mem": "100M", "slurm.time": "1-02:03:00", "slurm.exclude": ["n[1-2]"],
            "slurm.continue_by": "resubmit", "slurm.after": "99999", "slurm.exclusive": True,
            "slurm.directives": ["--nice=7"], "nodes": 2, "nproc_per_node": 2}  # fmt: skip
    config = RunConfig().changed({"trainer.use_cpu": True, **{f"launch.{key}": value for key, value in more.items()}})
    job = submit(slurm, tmp_path, job_script(config, tmp_path / "run", tmp_path, sys.executable), "--hold")
    text = slurm("scontrol", "show", "job", job)
    slurm("scancel", job)
    for part in ("NumNodes=2", "NumTasks=4", "CPUs/Task=1", "MinMemoryNode=100M", "TimeLimit=1-02:03:00", "Requeue=0",
                 "ExcNodeList=n[1-2]", "OverSubscribe=NO", "Nice=7", "NtasksPerN:B:S:C=2:"):  # fmt: skip
        assert part in text, part


def test_an_array_runs_one_task_at_a_time(slurm: Slurm, tmp_path: Path) -> None:
    config = config_of(slurm__continue_by="array", slurm__array_size=3)
    job = submit(slurm, tmp_path, job_script(config, tmp_path / "run", tmp_path, sys.executable), "--hold")
    text = slurm("scontrol", "show", "job", job)
    slurm("scancel", job)
    assert "ArrayTaskId=1-3%1" in text
    assert "Requeue=0" in text


@pytest.mark.parametrize("site", CASES)
def test_sbatch_understands_the_sites(slurm: Slurm, tmp_path: Path, site: str) -> None:
    """As far as this cluster has what they ask for: it fails on the partition, not on the script."""
    config = config_of_site(site, **{"trainer.use_cpu": True, "launch.slurm.partition": "nowhere"})
    path = tmp_path / "job.sbatch"
    path.write_text(job_script(config, tmp_path / "run", tmp_path, sys.executable))
    done = subprocess.run(["sbatch", str(path)], env=slurm.variables, capture_output=True, text=True, check=False)
    assert "invalid partition specified: nowhere" in done.stderr


def test_enc_render_composes_with_sbatch(slurm: Slurm, tmp_path: Path, environment: dict[str, str]) -> None:
    """`sbatch --parsable "$(enc render slurm ...)"` starts the run's supervisor, whose output is in the run folder."""
    enc = f"{sys.executable} -c 'from enc.launcher.cli.app import main; main()'"
    words = "render slurm smoke trainer.use_cpu=true launch.python=echo --to 'my job' 2>/dev/null"
    variables = {**environment, **slurm.variables}
    done = subprocess.run(
        ["bash", "-c", f'sbatch --parsable "$({enc} {words})"'], cwd=tmp_path, env=variables, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    job = done.stdout.strip()
    until_ended(slurm, job)
    said = (tmp_path / "runs" / "smoke" / "logs" / f"slurm-{job}.log").read_text()
    assert said.startswith(f"-P -m enc.launcher.supervise {tmp_path}/runs/smoke -- srun --nodes=1 --ntasks=1")
    assert os.path.exists(tmp_path / "my job" / "job.sbatch")
