"""The job script: golden files, and that every value reaches the processes unchanged or is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running import Enc
from scripts import CASES, CWD, PYTHON, RUN_DIR, SCRIPTS, config_of, script

from enc.encoder.config.checks import rule_problems
from enc.encoder.config.launch_checks import WRITTEN
from enc.encoder.config.schema import RunConfig
from enc.encoder.errors import UsageError
from enc.launcher.backends.slurm.script import job_script
from enc.launcher.planning.ranks import ranks_of_job


def rendered(config: RunConfig, run_dir: Path = RUN_DIR, cwd: Path = CWD, python: str = PYTHON) -> str:
    return job_script(config, run_dir, cwd, python)


# --- golden files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", CASES)
def test_scripts_equal_the_golden_files(site: str) -> None:
    """Byte for byte; `python tests/support/scripts.py` writes them anew."""
    assert script(site) == (SCRIPTS / f"{site}.sbatch").read_text()


def test_there_is_a_golden_file_for_each_site() -> None:
    assert sorted(path.stem for path in SCRIPTS.glob("*")) == CASES
    assert len(CASES) >= 8


@pytest.mark.parametrize("site", CASES)
def test_bash_accepts_the_scripts(site: str) -> None:
    subprocess.run(["bash", "-n", str(SCRIPTS / f"{site}.sbatch")], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say() -> None:
    """But that it cannot follow the file that a site sources."""
    done = subprocess.run(
        ["shellcheck", "--exclude=SC1091", *map(str, sorted(SCRIPTS.glob("*")))], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_a_script_depends_on_nothing_but_its_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither on the environment nor on the folder that it is rendered in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    assert script("pyxis") == (SCRIPTS / "pyxis.sbatch").read_text()


# --- what is asked for -----------------------------------------------------------------------------------------------


def directives(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]


def test_the_table_of_written_options_is_complete() -> None:
    """Each option that enc writes is one that a user's directives may not repeat."""
    everything = config_of("account-qos", **{"launch.slurm.after": "5"})
    texts = [rendered(everything), *map(script, CASES)]
    own = {"--switches", "--mail-type"}
    assert {line.partition("=")[0] for text in texts for line in directives(text)} - own == set(WRITTEN)


def test_a_run_on_cpus_asks_for_no_gpus() -> None:
    """Neither of SLURM nor of the container."""
    for site in CASES:
        text = rendered(config_of(site, **{"trainer.use_cpu": True}))
        assert "--gpus" not in text
        assert "--gres" not in text
        assert "--nv" not in text


def test_rejected_options_are_left_out() -> None:
    """Those that enc writes and those of the user, whatever their value."""
    more = {"launch.slurm.rejected": ["--mem", "--signal", "--comment"], "launch.slurm.directives": ["--comment=x"]}
    names = {line.partition("=")[0] for line in directives(rendered(config_of("plain", **more)))}
    assert names.isdisjoint({"--mem", "--signal", "--comment"})
    assert "--time" in names


def test_ranks_of_a_node_must_be_known_on_gpus() -> None:
    """One rank on CPUs or where no GPUs are asked for; else a number has to be given."""
    with pytest.raises(UsageError, match="--gpus-per-node"):
        ranks_of_job(RunConfig())
    assert ranks_of_job(RunConfig().changed({"launch.nproc_per_node": 3})) == 3
    assert ranks_of_job(RunConfig().changed({"trainer.use_cpu": True})) == 1
    assert ranks_of_job(RunConfig().changed({"launch.slurm.gpu_request": "none"})) == 1


# --- rules -----------------------------------------------------------------------------------------------------------

PYXIS: dict[str, Any] = {"launch.container.kind": "pyxis", "launch.container.image": "a.sqsh"}
APPTAINER: dict[str, Any] = {"launch.container.kind": "apptainer", "launch.container.image": "a.sif"}


@pytest.mark.parametrize(
    ("updates", "key", "words"),
    [
        ({"launch.env": {"A-B": "1"}}, "launch.env", "no name of a variable"),
        ({"launch.env": {"1A": "1"}}, "launch.env", "no name of a variable"),
        ({"launch.env": {"A\n": "1"}}, "launch.env", "no name of a variable"),
        ({"launch.env": {"": "1"}}, "launch.env", "no name of a variable"),
        ({"launch.env": {"SLURM_NTASKS": "1"}}, "launch.env.SLURM_NTASKS", "SLURM sets itself"),
        ({"launch.env": {"ENC_DEBUG": "1"}}, "launch.env.ENC_DEBUG", "enc sets itself"),
        ({"launch.env": {"RANK": "1"}}, "launch.env.RANK", "enc sets itself"),
        ({"launch.env": {"MASTER_PORT": "1"}}, "launch.env.MASTER_PORT", "enc sets itself"),
        ({"launch.env": {"UID": "1"}}, "launch.env.UID", "bash sets itself"),
        ({"launch.env": {"A": "x\0y"}}, "launch.env.A", "NUL"),
        ({"launch.env": {"A": "\ud800"}}, "launch.env.A", "half of a pair"),
        ({"launch.env": {"A": "x" * 100_001}}, "launch.env.A", "longer than the 100,000 bytes"),
        ({"launch.setup": ["export HF_TOKEN=hf_abc"]}, "launch.setup", "looks like a secret"),
        ({"launch.gpu": "h100"}, "launch.gpu", "did you mean h100-80gb?"),
        ({"launch.python": "-m"}, "launch.python", "no program"),
        ({"launch.container.image": "a.sif"}, "launch.container.image", "needs launch.container.kind"),
        ({"launch.container.mounts": ["/a:/b"]}, "launch.container.mounts", "needs launch.container.kind"),
        ({"launch.container.kind": "pyxis"}, "launch.container.kind", "needs launch.container.image"),
        ({**APPTAINER, "launch.container.image": "-x"}, "launch.container.image", "must not begin with a dash"),
        ({**PYXIS, "launch.container.python": "-x"}, "launch.container.python", "must not begin with a dash"),
        ({**PYXIS, "launch.container.mounts": ["/a:/b,/c:/d"]}, "launch.container.mounts", "several items"),
        ({**PYXIS, "launch.container.mounts": ["/a:"]}, "launch.container.mounts", "write host:container"),
        ({**PYXIS, "launch.container.args": ["-x"]}, "launch.container.args", "begins with --"),
        ({**PYXIS, "launch.container.args": ["--container-image=b"]}, "launch.container.args", "enc writes itself"),
        ({**PYXIS, "launch.slurm.srun": ["--container-mounts=b"]}, "launch.slurm.srun", "launch.container.mounts"),
        ({**APPTAINER, "launch.container.args": ["--cleanenv"]}, "launch.container.args", "hide from the ranks"),
        ({"launch.slurm.rejected": ["--requeue"]}, "launch.slurm.continue_by", "use resubmit"),
        (
            {"launch.slurm.rejected": ["--array"], "launch.slurm.continue_by": "array"},
            "launch.slurm.continue_by",
            "use requeue or resubmit",
        ),
        ({"launch.slurm.rejected": ["--requeu"]}, "launch.slurm.rejected", "did you mean --requeue?"),
        ({"launch.slurm.directives": ["--export=A=b"]}, "launch.slurm.directives", "put them into launch.env"),
        (
            {"launch.slurm.gpu_request": "gres", "launch.slurm.directives": ["--gres=nvme:1"]},
            "launch.slurm.directives",
            "launch.slurm.gpu_type: use that",
        ),
        (
            {"launch.slurm.gpu_request": "none", "launch.slurm.gpu_type": "a100"},
            "launch.slurm.gpu_type",
            "has no effect",
        ),
        ({"launch.slurm.time": "2"}, "launch.slurm.time", "no longer than the 120 s"),
        ({"launch.slurm.time": "1:00:00", "launch.slurm.signal_s": 3600}, "launch.slurm.time", "3600 s"),
    ],
)
def test_rules_of_the_section_launch(updates: dict[str, Any], key: str, words: str) -> None:
    """Each names its key and says what to do."""
    ((keys, text),) = rule_problems(RunConfig().changed(updates))
    assert keys[0] == key
    assert words in text


@pytest.mark.parametrize("option", [*WRITTEN, "--ntasks", "--gpus", "--chdir", "--error", "--wrap", "--wait"])
def test_directives_do_not_repeat_what_enc_writes(option: str) -> None:
    """With the key to use instead; --gres and --dependency are free where enc does not write them."""
    config = RunConfig().changed({"launch.slurm.directives": [f"{option}=1"]})
    free = {"--gres", "--dependency", "--exclusive"}
    assert [keys[0] for keys, text in rule_problems(config) if option in text] == (
        [] if option in free else ["launch.slurm.directives"]
    )


@pytest.mark.parametrize("option", ["--nodes=1", "-N1", "-n4", "--ntasks=1", "-c2", "--export=NONE", "-K1", "-ofile"])
def test_srun_options_do_not_repeat_what_enc_writes(option: str) -> None:
    ((keys, _),) = rule_problems(RunConfig().changed({"launch.slurm.srun": [option]}))
    assert keys[0] == "launch.slurm.srun"


@pytest.mark.parametrize(
    "updates",
    [
        {"launch.env": {"PYTHONPATH": "/x", "TOKENIZERS_PARALLELISM": "no", "MAX_TOKENS": "5", "A": "\n\x01'\"$(x)"}},
        {"launch.env": {"HF_TOKEN_PATH": "/home/me/.token", "PATH": "/bin", "_x": "", "CUDA_CACHE_PATH": "=~"}},
        {"launch.setup": ["export HF_TOKEN=$(cat ~/.token)", 'export HF_TOKEN="$OTHER"']},
        {"launch.slurm.directives": ["--gres=nvme:1", "--dependency=singleton", "--export=NONE", "--exclusive=user"]},
        {"launch.slurm.time": "0"},
        {"launch.slurm.time": "3"},
        {"launch.slurm.time": "1-0", "launch.slurm.signal_s": 65535},
        {"launch.gpu": "H100-80GB"},
        {**PYXIS, "launch.container.mounts": ["/a:/b:ro"], "launch.container.args": ["--container-writable"]},
    ],
)  # fmt: skip
def test_what_the_rules_allow(updates: dict[str, Any]) -> None:
    assert list(rule_problems(RunConfig().changed(updates))) == []


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "WANDB_API_KEY", "wandb_apikey", "DB_PASSWORD", "my_secret", "AWS_SECRET_ACCESS_KEY", "MYTOKEN"],
)
def test_secrets_are_refused_and_not_shown(enc: Enc, name: str) -> None:
    """What would land in a script, a config of a run and a checkpoint."""
    done = enc("config", "check", "smoke", f"launch.env.{name}='hunter-2'", code=2)
    assert "export it in the shell" in " ".join(done.stderr.split())
    assert "hunter" not in done.stderr + done.stdout
    done = enc("config", "check", "smoke", f"launch.env.{name}=7777", code=2)
    assert "7777" not in done.stderr + done.stdout


def test_names_that_bash_owns_are_refused() -> None:
    """A name is refused if a value exported under it does not arrive; of the others, those that begin with BASH."""
    known = subprocess.run(["bash", "-c", "compgen -v"], env={}, capture_output=True, text=True, check=True).stdout
    more = {"PS4", "CDPATH", "POSIXLY_CORRECT", "TMOUT", "RANDOM", "SECONDS", "UID", "LINENO", "_", "HOME", "LANG"}
    for name in more.union(known.split()):
        words = ["bash", "-c", f"export {name}='a /b'; cd /; exec /usr/bin/env -0"]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        arrives = f"{name}=a /b" in done.stdout.split("\0")
        refused = list(rule_problems(RunConfig().changed({"launch.env": {name: "5"}})))
        assert bool(refused) == (not arrives or name.startswith("BASH")), name


@pytest.mark.parametrize(
    ("updates", "run_dir", "cwd", "words"),
    [
        ({}, "/a/b\nc", "/w", "is '/a/b\\nc', with a '\\n'"),
        ({}, "/a/b\\c", "/w", "cannot take such a path"),
        ({}, "/a/\udcff", "/w", "not UTF-8"),
        ({}, "/a", "/w\udcff", "not UTF-8"),
        ({}, "/a/" + "b/" * 600, "/w", "longer than the 1000 bytes"),
        ({"launch.snapshot_code": True}, "/a:b", "/w", "launch.snapshot_code needs it"),
        (PYXIS, "/a,b", "/w", "mount options"),
        (PYXIS, "/a", "/w:x", "working folder"),
        (APPTAINER, "/a", '/w"x', "working folder"),
        ({**APPTAINER, "dataset.pre_tokenize_output": "x,y"}, "/a", "/w", "token store"),
    ],
)
def test_paths_that_cannot_be_passed_are_refused(updates: dict[str, Any], run_dir: str, cwd: str, words: str) -> None:
    """With the path and what is wrong with it."""
    config = RunConfig().changed({"launch.nproc_per_node": 1, **updates})
    with pytest.raises(UsageError) as error:
        rendered(config, Path(run_dir), Path(cwd))
    assert words in str(error.value)


# --- quoting, under a real bash --------------------------------------------------------------------------------------

HOSTILE = st.one_of(
    st.text(alphabet=" '\"$`\\!#%&*()[]{}<>|;~=,:@+-\n\r\t\x01\x1b\x7fäß漢😀\u2028\xa0aA0/.", max_size=12),
    st.text(max_size=20),
    st.sampled_from([
        "$(touch /nowhere)", "`id`", "'; exit 3; '", "\n#SBATCH --nodes=99\n", "a\r\nb", "$HOME", "${x:?}", "!!", "~",
        "~root", "-n", "--", "%j", "\\", "\\\\n", "'\"'\"'", "\x0b\x0c", "$'\\x41'", "{a,b}", "*", "<(x)", "x" * 5000,
    ]),
)  # fmt: skip
NAME = HOSTILE.map(lambda text: text.replace("/", "").replace("\0", "").strip(".")[:60]).filter(bool)

PROBE = """\
#!{python} -S
import json, os, sys
def text(value): return os.fsencode(value).decode("utf-8")
found = {{"argv": [text(word) for word in sys.argv[1:]], "cwd": text(os.getcwd()),
         "environ": {{text(key): text(value) for key, value in os.environ.items()}}}}
open({output!r}, "w", encoding="utf-8").write(json.dumps(found))
"""


class Bash:
    """Runs scripts whose Python is a probe that notes its arguments, environment and working folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.output, self.python = folder, folder / "found.json", folder / "probe python"
        self.python.write_text(PROBE.format(python=sys.executable, output=str(self.output)))
        self.python.chmod(0o755)

    def __call__(self, text: str) -> dict[str, Any]:
        path = self.folder / "job.sbatch"
        path.write_bytes(text.encode())
        self.output.unlink(missing_ok=True)
        environment = {"PATH": os.environ["PATH"], "HOME": "/root", "PYTHONPATH": "/earlier"}
        done = subprocess.run(["bash", str(path)], env=environment, cwd="/", capture_output=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        return json.loads(self.output.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def bash(tmp_path_factory: pytest.TempPathFactory) -> Bash:
    return Bash(tmp_path_factory.mktemp("bash"))


def encodable(text: str) -> bool:
    return "\0" not in text and not any("\ud800" <= char <= "\udfff" for char in text)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(values=st.lists(HOSTILE, min_size=40, max_size=40))
def test_every_environment_value_arrives_or_is_refused(bash: Bash, values: list[str]) -> None:
    """2,400 values; what is refused is only what no environment can hold."""
    wanted = {f"V{number}": value for number, value in enumerate(values) if encodable(value)}
    for value in values:
        refused = list(rule_problems(RunConfig().changed({"launch.env": {"V": value}})))
        assert bool(refused) != encodable(value)
    config = config_of("plain").changed({"launch.env": wanted})
    text = rendered(config, python=str(bash.python), cwd=bash.folder)
    found = bash(text)["environ"]
    assert {key: found.get(key) for key in wanted} == wanted
    assert "\r" not in text
    assert len(directives(text)) == len(directives(script("plain")))


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(names=st.lists(NAME, min_size=6, max_size=6), site=st.sampled_from(["plain", "apptainer", "pyxis"]))
def test_every_path_and_word_arrives_or_is_refused(bash: Bash, names: list[str], site: str) -> None:
    """2,400 of run folders, working folders, mounts, images and options of srun, as bash passes them."""
    first, second, *words = names
    run_dir, cwd = bash.folder / "runs" / first, bash.folder / "work" / second
    try:
        cwd.mkdir(parents=True, exist_ok=True)
    except (OSError, UnicodeEncodeError):  # no name of a folder
        cwd = bash.folder
    updates: dict[str, Any] = {
        "launch.slurm.srun": [f"--x={words[0]}"],
        "launch.snapshot_code": ":" not in str(run_dir),
    }
    if site != "plain":
        updates |= {"launch.container.image": words[1], "launch.container.mounts": [f"/{words[2]}:/x"],
                    "launch.container.args": [f"--y={words[3]}"]}  # fmt: skip
    config = config_of(site).changed(updates | {"launch.modules": []})
    try:
        text = rendered(config, run_dir, cwd, str(bash.python))
    except UsageError:
        impossible = ',:"\\\n' if site != "plain" else ""
        assert (
            not encodable(f"{run_dir}{cwd}")
            or any(char in str(run_dir) for char in "\n\\")
            or any(char in f"{run_dir}{cwd}" for char in impossible)
        )
        return
    if not encodable("".join(words)):
        return  # refused when a config is loaded: such a word does not print
    found = bash(text)
    assert found["cwd"] == str(cwd)
    assert found["environ"]["PWD"] == str(cwd)
    if updates["launch.snapshot_code"]:
        assert found["environ"]["PYTHONPATH"] == f"{run_dir}/code:/earlier"
    argv = found["argv"]
    assert argv[:6] == ["-P", "-m", "enc.launcher.supervise", str(run_dir), "--", "srun"]
    assert argv[-4:] == ["-P", "-m", "enc.launcher.rank", str(run_dir)]
    assert f"--x={words[0]}" in argv
    if site == "plain":
        assert argv[-5] == str(bash.python)
        return
    assert argv[-5] == "python3"
    assert f"--y={words[3]}" in argv
    mounted = {f"{path}:{path}" for path in (run_dir, cwd, cwd / "tokenized_data/smoke")} | {f"/{words[2]}:/x"}
    if site == "pyxis":
        assert f"--container-image={words[1]}" in argv
        (mounts,) = [word for word in argv if word.startswith("--container-mounts=")]
        assert f",{mounts.partition('=')[2]},".count(f",/{words[2]}:/x,") == 1
        assert all(f"{mount}" in mounts for mount in mounted)
        assert f"--container-workdir={cwd}" in argv
    else:
        assert argv[-6] == words[1]
        assert {word.removeprefix("--bind=") for word in argv if word.startswith("--bind=")} == mounted
        assert f"--pwd={cwd}" in argv


def test_modules_and_setup_run_before_the_rest(bash: Bash) -> None:
    """A module is one word, a setup line is shell, and the environment comes last; a failing line ends the job."""
    setup = ['module() { LOADED="$LOADED[$*]"; }; export -f module', "export A=1 LOADED=", 'module load "x y"', "B=$A"]
    config = config_of("plain").changed({"launch.setup": setup, "launch.env": {"A": "2"}})
    found = bash(rendered(config, cwd=bash.folder, python=str(bash.python)))["environ"]
    assert (found["A"], found["LOADED"]) == ("2", "[load x y]")
    text = rendered(config.changed({"launch.modules": ["a b", "c"]}))
    assert text.startswith("#!/bin/bash -l\n")
    assert "\nmodule load 'a b'\nmodule load c\nmodule()" in text
    broken = rendered(config.changed({"launch.setup": ["false"]}), cwd=bash.folder, python=str(bash.python))
    with pytest.raises(AssertionError):
        bash(broken)


# --- enc render slurm ------------------------------------------------------------------------------------------------


def test_render_slurm_prints_the_script(enc: Enc) -> None:
    """Without --to nothing is written; --gpus-per-node is one more name of --nproc."""
    done = enc("render", "slurm", "smoke", "--nodes", "2", "--gpus-per-node", "4")
    assert done.stdout.startswith("#!/bin/bash\n")
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=4\n#SBATCH --gpus-per-node=4\n" in done.stdout
    assert f"enc.launcher.rank {enc.folder}/runs/smoke\n" in done.stdout
    assert list(enc.folder.iterdir()) == []
    assert done.stdout == enc("render", "slurm", "smoke", "--nodes=2", "--nproc=4").stdout


def test_render_slurm_writes_what_a_job_needs(enc: Enc) -> None:
    """The path alone on stdout; the run folder has the config and the folder of the job's log."""
    words = ["render", "slurm", "smoke", "--site", "plain", "--to", "my job", "parallel.engine=fsdp"]
    done = enc(*words)
    assert done.stdout == "my job/job.sbatch\n"
    assert {path.name for path in (enc.folder / "my job").iterdir()} == {"job.sbatch", "config.yaml", "fsdp.json"}
    run = enc.folder / "runs" / "smoke"
    assert (run / "logs").is_dir()
    for name in ("job.sbatch", "config.yaml", "fsdp.json"):  # a job that resubmits takes its script from the run folder
        assert (run / name).read_text() == (enc.folder / "my job" / name).read_text()
    loaded = enc("config", "show", str(run / "config.yaml"), "--json")
    config = json.loads(loaded.stdout)
    assert config["launch"]["nproc_per_node"] == 8
    assert config["trainer"]["global_batch_size"] == 32
    assert config["trainer"]["output_dir"] == str(run)
    again = json.loads(enc(*words, "--json").stdout)
    assert again["files"]["job.sbatch"] == "my job/job.sbatch"
    assert again["script"] == (enc.folder / "my job" / "job.sbatch").read_text()
    assert (again["run_dir"], again["nodes"], again["nproc_per_node"]) == (str(run), 1, 8)
    status = json.loads(enc("status", str(run), "--json").stdout)
    assert (status["state"], status["why"]) == ("stopped", "Its job script was written; the job has not begun.")


def test_render_slurm_keeps_off_an_older_run(enc: Enc) -> None:
    """Its config is not replaced, and nothing is written."""
    run = enc.folder / "runs" / "smoke"
    (run / "checkpoints" / "5").mkdir(parents=True)
    (run / "config.yaml").write_text("seed: 7\n")
    done = enc("render", "slurm", "smoke", "--site", "plain", "--to", "job", code=2)
    assert "enc resume" in done.stderr
    assert (run / "config.yaml").read_text() == "seed: 7\n"
    assert not (enc.folder / "job").exists()


def test_render_slurm_without_the_number_of_gpus(enc: Enc) -> None:
    """Eight are assumed and said; a run on CPUs asks for none."""
    done = enc("render", "slurm", "smoke", "trainer.per_device_train_batch_size=1")
    assert "8 are assumed. --gpus-per-node N says it" in done.stderr
    assert "#SBATCH --gpus-per-node=8" in done.stdout
    assert "--gpus-per-node" not in enc("render", "slurm", "smoke", "trainer.use_cpu=true").stdout


def test_render_slurm_takes_every_name_of_a_run_folder(enc: Enc) -> None:
    """Or refuses it in one sentence."""
    words = ["render", "slurm", "smoke", "trainer.use_cpu=true"]
    odd = 'runs/it\'s "50%" $(x) #1, äö'
    assert "--output=" in enc(*words, f"trainer.output_dir={json.dumps(odd)}").stdout
    done = enc(*words, 'trainer.output_dir="a\\\\b"', code=2)
    assert "trainer.output_dir" in done.stderr
