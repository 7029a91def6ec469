"""The job script of a run on SLURM: a pure function of the config and a few paths. No torch.

A value in it is read by one of two grammars: bash's, or the one that sbatch has for `#SBATCH` lines. `shell_word` and
`sbatch_value` write a text so that it arrives as it is; what cannot is refused, with the key that it came from. A path
goes through a third grammar: `--output` replaces `%` sequences, and nothing can protect a backslash there.
"""

import shlex
import sys
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from enc.encoder.config.schema import RunConfig
from enc.encoder.data.sources.find import store_path
from enc.encoder.errors import UsageError
from enc.launcher.planning.plan import Plan
from enc.launcher.planning.ranks import ranks_of_job

SCRIPT_FILE = "job.sbatch"
_TEMPLATES = Path(__file__).parents[3] / "slurm"
_LONGEST_PATH = 1000  # bytes of an --output; SLURM takes 1,024
_ANSI_C = {"\\": r"\\", "'": r"\'", "\n": r"\n", "\r": r"\r", "\t": r"\t"}

Option = tuple[str, str | None]


def script_of(plan: Plan) -> str:
    """Return the job script of a plan, for the working folder and Python of this process."""
    return job_script(plan.config, plan.run_dir, plan.cwd, plan.config.launch.python or sys.executable)


def job_script(config: RunConfig, run_dir: Path, cwd: Path, python: str) -> str:
    """Return the script that sbatch is given: the same text for the same arguments.

    `run_dir` and `cwd` are absolute; `python` runs the batch process where `launch.python` names no other.

    Raises:
        UsageError: a value cannot get through bash or sbatch unchanged, or the ranks of a node are not known.
    """
    launch = config.launch
    host_python = launch.python or python
    _check_values(config, run_dir, cwd, host_python)
    container, rank_python = _container(config, run_dir, cwd, host_python)
    template = _environment().get_template(f"{SCRIPT_FILE}.j2")
    return template.render(
        directives=[option for option in _directives(config, run_dir) if option[0] not in launch.slurm.rejected],
        modules=launch.modules,
        setup=launch.setup,
        env={"PYTHONUNBUFFERED": "1", **launch.env}.items(),
        code=str(run_dir / "code") if launch.snapshot_code else None,
        cwd=str(cwd),
        supervise=[host_python, "-P", "-m", "enc.launcher.supervise", str(run_dir)],
        srun=_srun(config, run_dir, cwd),
        container=container,
        rank=[rank_python, "-P", "-m", "enc.launcher.rank", str(run_dir)],
    )


# --- what is in the script -------------------------------------------------------------------------------------------


def _directives(config: RunConfig, run_dir: Path) -> list[Option]:
    """Return the `#SBATCH` options in their order; None stands for an option without a value."""
    slurm = config.launch.slurm
    log = "slurm-%A_%a.log" if slurm.continue_by == "array" else "slurm-%j.log"
    options: list[tuple[str, object]] = [
        ("--job-name", run_dir.name),
        ("--nodes", config.launch.num_nodes),
        ("--ntasks-per-node", ranks_of_job(config)),
        *_gpus(config),
        ("--cpus-per-task", slurm.cpus_per_task),
        ("--mem", slurm.mem),
        ("--exclusive", slurm.exclusive),
        ("--partition", slurm.partition),
        ("--account", slurm.account),
        ("--qos", slurm.qos),
        ("--constraint", slurm.constraint),
        ("--reservation", slurm.reservation),
        ("--time", slurm.time),
        ("--output", f"{run_dir / 'logs'}/".replace("%", "%%") + log),
        ("--open-mode", "append"),
        ("--signal", f"B:USR1@{slurm.signal_s}"),
        ("--requeue" if slurm.continue_by == "requeue" else "--no-requeue", True),
        ("--exclude", ",".join(slurm.exclude) or None),
        ("--dependency", f"afterany:{slurm.after}" if slurm.after else None),
        ("--array", f"1-{slurm.array_size}%1" if slurm.continue_by == "array" else None),
    ]
    own = [word.partition("=") for word in slurm.directives]
    return [
        *((name, None if value is True else str(value)) for name, value in options if value not in (None, False)),
        *((name, value if equals else None) for name, equals, value in own),
    ]


def _gpus(config: RunConfig) -> list[tuple[str, object]]:
    slurm, count = config.launch.slurm, ranks_of_job(config)
    typed = f"{slurm.gpu_type}:{count}" if slurm.gpu_type else str(count)
    if config.trainer.use_cpu or slurm.gpu_request == "none":
        return []
    return [("--gres", f"gpu:{typed}")] if slurm.gpu_request == "gres" else [("--gpus-per-node", typed)]


def _srun(config: RunConfig, run_dir: Path, cwd: Path) -> list[str]:
    """Return the options of srun. It does not take `--cpus-per-task` over from the job (since SLURM 22.05).

    A rank's task only fails for good, and late (`enc.launcher.rank`): then srun ends the others too. It waits for none.
    """
    launch, ranks = config.launch, ranks_of_job(config)
    words = [
        f"--nodes={launch.num_nodes}",
        f"--ntasks={launch.num_nodes * ranks}",
        f"--ntasks-per-node={ranks}",
        *([f"--cpus-per-task={launch.slurm.cpus_per_task}"] if launch.slurm.cpus_per_task else []),
        "--kill-on-bad-exit=1",
        "--wait=0",
        "--unbuffered",
        "--export=ALL",
        *launch.slurm.srun,
    ]
    if launch.container.kind == "pyxis":
        words += [
            f"--container-image={launch.container.image}",
            f"--container-mounts={','.join(_mounts(config, run_dir, cwd))}",
            f"--container-workdir={cwd}",
            *launch.container.args,
        ]
    return words


def _container(config: RunConfig, run_dir: Path, cwd: Path, host_python: str) -> tuple[list[str], str]:
    """Return the words between srun and a rank's Python, and that Python."""
    container = config.launch.container
    if container.kind != "apptainer":
        return [], host_python if container.kind == "none" else container.python
    words = [
        "apptainer",
        "exec",
        *([] if config.trainer.use_cpu else ["--nv"]),
        *(f"--bind={mount}" for mount in _mounts(config, run_dir, cwd)),
        f"--pwd={cwd}",
        *container.args,
        str(container.image),
    ]
    return words, container.python


def _mounts(config: RunConfig, run_dir: Path, cwd: Path) -> list[str]:
    folders = {str(run_dir), str(cwd / store_path(config.dataset)), str(cwd)}
    return [*(f"{folder}:{folder}" for folder in sorted(folders)), *config.launch.container.mounts]


# --- what cannot be in it --------------------------------------------------------------------------------------------


def _check_values(config: RunConfig, run_dir: Path, cwd: Path, python: str) -> None:
    launch = config.launch
    paths = {"The run folder (trainer.output_dir)": str(run_dir), "The working folder": str(cwd),
             "The Python of the job (launch.python)": python}  # fmt: skip
    for what, path in paths.items():
        _refuse(what, path, "\0", "")
        if any("\ud800" <= char <= "\udfff" for char in path):
            raise UsageError(f"{what} is {path!r}, which is not UTF-8, and the job script is; rename it.")
    what = "The run folder (trainer.output_dir)"
    _refuse(what, str(run_dir), "\n\\", ", and SLURM cannot take such a path for the job's log")
    if len(f"{run_dir}".replace("%", "%%").encode()) > _LONGEST_PATH:
        raise UsageError(f"{what} is longer than the {_LONGEST_PATH} bytes that SLURM takes: {run_dir}. Shorten it.")
    if launch.snapshot_code:
        _refuse(what, str(run_dir), ":", ", which separates folders in PYTHONPATH (launch.snapshot_code needs it)")
    if launch.container.kind != "none":
        paths["The token store (dataset.pre_tokenize_output)"] = str(cwd / store_path(config.dataset))
        for what, path in paths.items():
            if path != python:
                _refuse(what, path, ',:"\\\n', ", which the mount options of containers do not take")


def _refuse(what: str, path: str, chars: str, why: str) -> None:
    found = next((char for char in chars if char in path), None)
    if found is not None:
        raise UsageError(f"{what} is {path!r}, with a {found!r} in its name{why}; rename it or choose another.")


# --- quoting ---------------------------------------------------------------------------------------------------------


def shell_word(text: str) -> str:
    """Return a text as one word of bash. What does not print is written as an escape, so a word stays on its line.

    sbatch refuses a script that has a carriage return before a line break anywhere.
    """
    return shlex.quote(text) if text.isprintable() else quoted_word(text)


def quoted_word(text: str) -> str:
    """Return a text as one word of bash that is quoted even where it need not be."""
    if text.isprintable():
        return "'" + text.replace("'", "'\"'\"'") + "'"
    return "$'" + "".join(_escaped(char) for char in text) + "'"


def _escaped(char: str) -> str:
    if char.isprintable() or char in _ANSI_C:
        return _ANSI_C.get(char, char)
    return "".join(f"\\{byte:03o}" for byte in char.encode())


def sbatch_value(text: str) -> str:
    """Return a text as the value of an option in a `#SBATCH` line.

    sbatch splits such a line at white space and ends it at a `#`, outside of quotes; a backslash protects the next
    character, inside of quotes too. There is no way to write a line break.
    """
    if all(char.isalnum() or char in "-_./:,=@%+" for char in text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"sh": shell_word, "quoted": quoted_word, "sbatch": sbatch_value}
    return environment
