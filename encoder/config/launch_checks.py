"""Rules of the section `launch`: what would clash with what enc itself writes into a job script, or never work.

A rule yields (keys involved, what is wrong and what to do), as in `checks`. No message shows an environment
value: it may be a secret.
"""

import re
from collections.abc import Iterator

from enc.encoder.config.launch import ContainerConfig, LaunchConfig, SlurmConfig
from enc.encoder.config.schema import RunConfig
from enc.encoder.gpus import GPUS
from enc.encoder.spelling import did_you_mean

Broken = tuple[tuple[str, ...], str]
"""A broken rule: the keys involved, and what is wrong and what to do."""

# What enc writes into `#SBATCH` lines -> what sets it.
WRITTEN = {
    "--job-name": "the name of the run folder, trainer.output_dir",
    "--output": "the run folder, trainer.output_dir",
    "--open-mode": "nothing: logs are always appended to",
    "--nodes": "launch.nodes",
    "--ntasks-per-node": "launch.nproc_per_node",
    "--gpus-per-node": "launch.nproc_per_node and launch.slurm.gpu_type",
    "--gres": "launch.nproc_per_node and launch.slurm.gpu_type",
    "--cpus-per-task": "launch.slurm.cpus_per_task",
    "--mem": "launch.slurm.mem",
    "--exclusive": "launch.slurm.exclusive",
    "--partition": "launch.slurm.partition",
    "--account": "launch.slurm.account",
    "--qos": "launch.slurm.qos",
    "--constraint": "launch.slurm.constraint",
    "--reservation": "launch.slurm.reservation",
    "--time": "launch.slurm.time",
    "--exclude": "launch.slurm.exclude",
    "--dependency": "launch.slurm.after",
    "--signal": "launch.slurm.signal_s",
    "--requeue": "launch.slurm.continue_by",
    "--no-requeue": "launch.slurm.continue_by",
    "--array": "launch.slurm.continue_by and launch.slurm.array_size",
}
_OTHER_DIRECTIVES = {
    "--ntasks": "launch.nodes and launch.nproc_per_node",
    "--gpus": "launch.nproc_per_node",
    "--gpus-per-task": "launch.nproc_per_node",
    "--ntasks-per-gpu": "launch.nproc_per_node",
    "--chdir": "the folder that the run is started from",
    "--error": "the run folder, trainer.output_dir",
    "--wrap": "nothing: the script is enc's",
    "--wait": "nothing: enc does not wait for its jobs",
    "--test-only": "nothing: use `enc render slurm`",
    "--parsable": "nothing: enc reads the answer itself",
}
_SRUN = {
    **dict.fromkeys(("--nodes", "-N"), "launch.nodes"),
    **dict.fromkeys(("--ntasks", "-n"), "launch.nodes and launch.nproc_per_node"),
    "--ntasks-per-node": "launch.nproc_per_node",
    **dict.fromkeys(("--cpus-per-task", "-c"), "launch.slurm.cpus_per_task"),
    **dict.fromkeys(("--kill-on-bad-exit", "-K", "--wait", "-W"), "nothing: enc watches its ranks itself"),
    **dict.fromkeys(("--output", "-o", "--error", "-e"), "the run folder, trainer.output_dir"),
    **dict.fromkeys(("--input", "-i", "--unbuffered", "-u"), "nothing: enc takes care of it"),
    "--export": "launch.env",
    **dict.fromkeys(("--chdir", "-D"), "the folder that the run is started from"),
}
_PYXIS = {
    "--container-image": "launch.container.image",
    "--container-mounts": "launch.container.mounts",
    "--container-workdir": "the folder that the run is started from",
}

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SET_BY_ENC = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "MASTER_ADDR",
               "MASTER_PORT"}  # fmt: skip
_PREFIXES = {"SLURM_": "SLURM", "SBATCH_": "SLURM", "SRUN_": "SLURM", "ENC_": "enc", "BASH": "bash"}
_SET_BY_BASH = {"DIRSTACK", "EPOCHREALTIME", "EPOCHSECONDS", "EUID", "FUNCNAME", "GROUPS", "HISTCMD", "LINENO",
                "OLDPWD", "OPTIND", "PIPESTATUS", "PPID", "PWD", "RANDOM", "SECONDS", "SHELLOPTS", "SHLVL", "SRANDOM",
                "UID", "_"}  # fmt: skip
# TOKENIZERS_PARALLELISM and MAX_TOKENS are no secrets, and the name of a file with one is none either.
_SECRET = re.compile(
    r"(?:TOKEN(?![A-Z])|SECRET|PASSW(?:OR)?D|API_?KEY|ACCESS_KEY|PRIVATE_KEY)(?!\w*_(?:FILE|PATH|DIR)$)", re.IGNORECASE
)
_ASSIGNMENT = re.compile(r"\b([A-Za-z_][A-Za-z0-9_]*)=[\"']?([^\s\"'$`])")
_LONGEST_VALUE = 100_000  # bytes; Linux takes 128 KiB for one variable
_CLEANS_ENVIRONMENT = ("--cleanenv", "-e", "--containall", "-C")


def launch_rules(config: RunConfig) -> Iterator[Broken]:
    """Yield every broken rule of the section `launch`."""
    launch = config.launch
    yield from _environment_rules(launch)
    yield from _container_rules(launch.container)
    yield from _directive_rules(launch.slurm)
    yield from _srun_rules(launch)
    yield from _job_rules(launch.slurm)
    names = [gpu.name for gpu in GPUS]
    if launch.gpu and launch.gpu.lower() not in names:
        yield (
            ("launch.gpu",),
            f"is {launch.gpu!r}; known are {', '.join(names)}{did_you_mean(launch.gpu.lower(), names)}",
        )
    if launch.python and launch.python.startswith("-"):
        yield ("launch.python",), f"is {launch.python!r}, which is no program"


def _environment_rules(launch: LaunchConfig) -> Iterator[Broken]:
    for name, value in launch.env.items():
        keys = (f"launch.env.{name}",)
        owner = next((who for prefix, who in _PREFIXES.items() if name.startswith(prefix)), None)
        if not _NAME.fullmatch(name):
            yield (
                ("launch.env",),
                f"has {name!r}, which is no name of a variable: use letters, digits and _, a digit not first",
            )
        elif owner or name in _SET_BY_ENC or name in _SET_BY_BASH:
            who = owner or ("enc" if name in _SET_BY_ENC else "bash")
            yield keys, f"is a variable that {who} sets itself; take it out"
        elif _SECRET.search(name):
            yield keys, f"looks like a secret and would stand in the job script; {_EXPORT_IT}"
        elif "\0" in value or not _is_utf8(value):
            yield keys, "has a character that no environment variable can hold (NUL, or half of a pair); take it out"
        elif len(value.encode()) > _LONGEST_VALUE:
            yield keys, f"is longer than the {_LONGEST_VALUE:,} bytes that a variable can hold; put it into a file"
    for line in launch.setup:
        if any(_SECRET.search(name) for name, _ in _ASSIGNMENT.findall(line)):
            yield ("launch.setup",), f"sets what looks like a secret, in the job script; {_EXPORT_IT}"


_EXPORT_IT = "export it in the shell that starts the run: a job inherits it"


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in text)


def _container_rules(container: ContainerConfig) -> Iterator[Broken]:
    key = "launch.container"
    if container.kind == "none":
        given = [name for name in ("image", "mounts", "args") if getattr(container, name)]
        for name in given:
            yield (f"{key}.{name}", f"{key}.kind"), f"needs {key}.kind pyxis or apptainer"
        return
    if not container.image:
        yield (f"{key}.kind", f"{key}.image"), f"is {container.kind}, which needs {key}.image"
    for name in ("image", "python"):
        if (getattr(container, name) or "").startswith("-"):
            yield (f"{key}.{name}",), f"is {getattr(container, name)!r}; it must not begin with a dash"
    for mount in container.mounts:
        if any(char in mount for char in ',"\\'):
            yield (
                (f"{key}.mounts",),
                f'has {mount!r}; a mount cannot hold a comma, " or \\ (write several mounts as several items)',
            )
        elif not all(mount.split(":")):
            yield (f"{key}.mounts",), f"has {mount!r}; write host:container"
    if container.kind == "pyxis":
        yield from _clashes(f"{key}.args", container.args, _PYXIS)
        for word in container.args:
            if not word.startswith("--"):
                yield (f"{key}.args",), f"has {word!r}; an option of pyxis begins with --"
    else:
        for word in set(container.args).intersection(_CLEANS_ENVIRONMENT):
            yield (f"{key}.args",), f"has {word!r}, which would hide from the ranks who they are; take it out"


def _directive_rules(slurm: SlurmConfig) -> Iterator[Broken]:
    free = {"--gres"} if slurm.gpu_request != "gres" else set()
    free |= {"--dependency"} if slurm.after is None else set()
    free |= {word for word in slurm.directives if word.startswith("--exclusive=") and not slurm.exclusive}
    refused = {name: key for name, key in {**WRITTEN, **_OTHER_DIRECTIVES}.items() if name not in free}
    words = [word for word in slurm.directives if word not in free]
    yield from _clashes("launch.slurm.directives", words, refused)
    for word in slurm.directives:
        if word.startswith("--export=") and "=" in word.removeprefix("--export="):
            yield ("launch.slurm.directives",), "has --export with values; put them into launch.env"
    names = [*WRITTEN, *(_option(word) for word in slurm.directives)]
    for word in slurm.rejected:
        if word not in names:
            text = f"has {word!r}, which enc does not write{did_you_mean(word, names)}"
            yield ("launch.slurm.rejected",), text


def _srun_rules(launch: LaunchConfig) -> Iterator[Broken]:
    refused = _SRUN | (_PYXIS if launch.container.kind == "pyxis" else {})
    yield from _clashes("launch.slurm.srun", launch.slurm.srun, refused)


def _clashes(key: str, words: list[str], refused: dict[str, str]) -> Iterator[Broken]:
    for word in words:
        name = _option(word)
        if name in refused:
            how = refused[name] if refused[name].startswith("nothing") else f"{refused[name]}: use that"
            yield (key,), f"has {name}, which enc writes itself, from {how}"


def _option(word: str) -> str:
    """Return the name of an option: `--time` of `--time=3`, `-c` of `-c4`."""
    return word.partition("=")[0] if word.startswith("--") else word[:2]


def _job_rules(slurm: SlurmConfig) -> Iterator[Broken]:
    how = "launch.slurm.continue_by"
    if slurm.continue_by in ("requeue", "array") and f"--{slurm.continue_by}" in slurm.rejected:
        other = "resubmit" if slurm.continue_by == "requeue" else "requeue or resubmit"
        text = f"is {slurm.continue_by}, but launch.slurm.rejected has --{slurm.continue_by}; use {other}"
        yield (how, "launch.slurm.rejected"), text
    if slurm.gpu_type and slurm.gpu_request == "none":
        yield ("launch.slurm.gpu_type", "launch.slurm.gpu_request"), "has no effect with launch.slurm.gpu_request none"
    limit = time_limit_s(slurm.time) if slurm.time else None
    if limit is not None and limit <= slurm.signal_s:
        text = f"is {slurm.time}, no longer than the {slurm.signal_s} s of launch.slurm.signal_s before its end"
        yield ("launch.slurm.time", "launch.slurm.signal_s"), text


def time_limit_s(text: str) -> int | None:
    """Return the seconds of a time limit as SLURM writes it; None stands for no limit, which is written 0.

    MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS.
    """
    days, dash, rest = text.rpartition("-")
    numbers = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours, minutes, seconds = 0, *[*numbers, 0][:2]
    return (((int(days or 0) * 24) + hours) * 60 + minutes) * 60 + seconds or None
