"""What can be known to go wrong before a run is started or queued. No torch.

`preflight` observes and calls the checks; each check is a function of what was observed and returns findings: red is
sure to fail, yellow may, green is a fact worth knowing.
"""

import os
import re
import resource
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from math import ceil
from pathlib import Path

import enc
from enc.encoder.checkpoints.folder import list_checkpoints
from enc.encoder.config.launch import SlurmConfig
from enc.encoder.config.launch_checks import time_limit_s
from enc.encoder.config.schema import RunConfig
from enc.encoder.data.obtain import local_folder
from enc.encoder.data.sources.find import held_out_sources, resolve_source
from enc.encoder.data.sources.source import Source
from enc.encoder.data.store import read_manifest
from enc.encoder.errors import UsageError
from enc.encoder.gpus import find_gpu
from enc.encoder.sizing.memory import largest_rows, peak_parts, static_bytes
from enc.encoder.sizing.sizes import checkpoint_bytes
from enc.launcher.backends.slurm import commands as slurm
from enc.launcher.checks import surroundings
from enc.launcher.checks.findings import Finding, green, red, size, yellow
from enc.launcher.machine.devices import device_bytes, ram_bytes
from enc.launcher.machine.facts import (
    Mount,
    build_locks,
    can_bind_port,
    existing_parent,
    extensions_folder,
    home,
    read_mounts,
    why_node_local,
)
from enc.launcher.planning.engine_choice import USABLE
from enc.launcher.planning.plan import Plan

_SHORT_S = 300
_IMAGE_FILES = (".sif", ".sqsh", ".squashfs")


def preflight(plan: Plan, for_slurm: bool) -> list[Finding]:
    """Check whether a plan can work from here: on this machine, or as a job of SLURM. Takes about 0.1 s."""
    variables = {**os.environ, **plan.config.launch.env}
    mounts = read_mounts()
    checks: dict[str, Callable[[], Iterable[Finding]]] = {
        "SLURM": lambda: check_slurm(plan.config, slurm.is_installed(), dict(os.environ)) if for_slurm else (),
        "time limit": lambda: check_time(plan.config.launch.slurm) if for_slurm else (),
        "run folder": lambda: [check_folder("trainer.output_dir", "run folder", plan.run_dir)],
        "TensorBoard": lambda: _check_tensorboard(plan.config.trainer.tensorboard_dir),
        "text": lambda: check_text(plan),
        "tokenizer": lambda: check_tokenizer(plan),
        "shared paths": lambda: check_shared(shared_paths(plan), mounts) if for_slurm else (),
        "python": lambda: check_programs(plan.config) if for_slurm else (),
        "disk": lambda: [check_disk(plan, _free_bytes(plan.run_dir), len(list_checkpoints(plan.run_dir)))],
        "batch": lambda: check_batch(plan, _rows_in_store(plan)),
        "replicas": lambda: check_replicas(plan.config, plan.split.world_size),
        "memory": lambda: [check_memory(plan, *_device(plan, for_slurm))],
        "RAM": lambda: _check_ram(plan, for_slurm),
        "W&B": lambda: _check_wandb(plan.config, variables),
        "hub": lambda: surroundings.check_hub([] if plan.store_ready else _hub_names(plan.config), variables),
        "build lock": lambda: _check_locks(plan.config, variables, mounts),
        "caches": lambda: surroundings.check_caches(_caches(plan, variables), mounts),
        "open files": lambda: [surroundings.check_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE))],
        "port": lambda: [] if for_slurm else [check_port(can_bind_port())],
    }  # fmt: skip
    return [finding for what, check in checks.items() for finding in _carefully(what, check)]


def _carefully(what: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    try:
        return list(check())
    except UsageError as error:
        return [red(what, str(error))]
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        return [yellow(what, f"could not be checked: {error.strerror or error}{place}", "look at its permissions")]


# --- SLURM -----------------------------------------------------------------------------------------------------------


def check_slurm(config: RunConfig, is_installed: bool, variables: dict[str, str]) -> Iterator[Finding]:
    """A job is submitted with sbatch, which must be here."""
    if not is_installed:
        fix = "start it on a login node, write the script with `enc render slurm`, or set launch.scheduler local"
        yield red("SLURM", "this run is for SLURM, but there is no sbatch on this machine", fix)
    if "SLURM_JOB_ID" in variables:
        yield green("SLURM", f"this is inside job {variables['SLURM_JOB_ID']}; the run becomes a job of its own")


def check_time(slurm_config: SlurmConfig) -> Iterator[Finding]:
    """The time of a job must have room for a start, some steps and a save."""
    limit = time_limit_s(slurm_config.time) if slurm_config.time else None
    if limit and limit < max(_SHORT_S, 2 * slurm_config.signal_s):
        text = f"launch.slurm.time {slurm_config.time} is {limit} s: starting and saving may take most of it"
        yield yellow("time limit", text, "a longer launch.slurm.time")


def shared_paths(plan: Plan) -> dict[str, Path]:
    """Return what the compute nodes read and write."""
    paths = {"the run folder": plan.run_dir, "the token store": plan.store}
    launch = plan.config.launch
    if launch.container.kind == "none" and not launch.python:
        if sys.prefix != sys.base_prefix:
            paths["the Python environment"] = Path(sys.prefix)
        if not launch.snapshot_code:
            paths["enc itself"] = Path(enc.__file__).parent
    return paths


def check_shared(paths: dict[str, Path], mounts: list[Mount]) -> Iterator[Finding]:
    """What the compute nodes use must lie where they see it."""
    hidden: dict[str, list[str]] = {}
    for name, path in paths.items():
        if why := why_node_local(path, mounts):
            hidden.setdefault(why, []).append(f"{name} ({path})")
    for why, names in hidden.items():
        text = f"the compute nodes will likely not see {', '.join(names)}: {why}"
        yield yellow("shared paths", text, "use a file system that all nodes share")
    if not hidden:
        yield green("shared paths", "nothing that the nodes need lies on a local file system of this machine")


def check_programs(config: RunConfig) -> Iterator[Finding]:
    """The Python and the container image that are named must exist, where this machine can tell."""
    launch = config.launch
    if launch.container.kind == "none" and launch.python:
        yield from _check_file("launch.python", launch.python, "/" in launch.python)
    image = launch.container.image
    if launch.container.kind != "none" and image:
        yield from _check_file("launch.container.image", image, image.startswith("/") or image.endswith(_IMAGE_FILES))


def _check_file(key: str, value: str, is_path: bool) -> Iterator[Finding]:
    """A file whose folder is here must be in it; a folder that is not here may be on the nodes."""
    path, what = Path(value).expanduser(), key.rpartition(".")[2]
    if not is_path:
        if key == "launch.python" and shutil.which(value) is None:
            yield yellow(what, f"{key} {value} is not on the PATH here", "name it with its full path")
    elif not path.exists() and path.parent.is_dir():
        yield red(what, f"{key} {value} does not exist", f"look into {path.parent} for its right name")
    elif not path.exists():
        yield yellow(what, f"{key} {value} is not on this machine; it must be on the nodes", "check the path")


# --- files -----------------------------------------------------------------------------------------------------------


def check_folder(key: str, what: str, folder: Path) -> Finding:
    """The run folder, or another that a run writes, or the nearest folder above it, must take new files."""
    parent = existing_parent(folder)
    if not parent.is_dir():
        return red(what, f"{folder} cannot be made: {parent} is a file", f"choose another {key}")
    if not os.access(parent, os.W_OK | os.X_OK):
        fix = f"choose another {key}, or mend its permissions"
        return red(what, f"{folder} cannot be written: {parent} does not allow it", fix)
    return green(what, str(folder))


def _check_tensorboard(folder: str | None) -> Iterator[Finding]:
    if folder:
        yield check_folder("trainer.tensorboard_dir", "TensorBoard", Path(folder).absolute())


def check_text(plan: Plan) -> Iterator[Finding]:
    """The token store must be readable, or what it will be made from, and its place writable."""
    if plan.store_ready:
        files = [plan.store / name for name in ("manifest.json", *read_manifest(plan.store)["files"])]
        yield from _unreadable("token store", files)
        return
    source = resolve_source(plan.config.dataset)
    sources = [source, *held_out_sources(source, plan.config.dataset).values()]
    yield from _unreadable("text", [path for part in sources for path in part.paths])
    parent = existing_parent(plan.store)
    if not os.access(parent, os.W_OK | os.X_OK):
        yield red("token store", f"{plan.store} cannot be made: {parent} does not allow it",
                  "set dataset.pre_tokenize_output to another folder")  # fmt: skip
    yield green("token store", f"{plan.store} is not there yet; it is made first, from {_named(source)}")


def _named(source: Source) -> str:
    return {"hub": f"the hub's {source.location}", "python-docs": "python-docs"}.get(source.kind, source.place)


def _unreadable(what: str, files: list[Path]) -> Iterator[Finding]:
    bad = [path for path in files if not os.access(path, os.R_OK)]
    if bad:
        count = f" (and {len(bad) - 1:,} more)" if len(bad) > 1 else ""
        yield red(what, f"{bad[0]} cannot be read{count}", "mend its permissions, or use a copy")


def check_tokenizer(plan: Plan) -> Iterator[Finding]:
    """A tokenizer's folder must be there while no token store has a copy."""
    if plan.store_ready or plan.config.tokenizer.train:
        return
    folder = local_folder(plan.config.tokenizer)
    if folder is not None and not any(os.access(path, os.R_OK) for path in folder.iterdir()):
        yield red("tokenizer", f"{folder} has no file that can be read", "name another folder in tokenizer.path")


def check_disk(plan: Plan, free: int, existing: int) -> Finding:
    """The disk must take the checkpoints that will be kept and the one being written, beside those that are there."""
    one, reserve = checkpoint_bytes(plan.config), plan.config.trainer.min_free_disk_gb * 1e9
    kept = max(2, checkpoints_kept(plan) + 1 - existing)
    left = f" with trainer.min_free_disk_gb {reserve / 1e9:g} left free" if reserve else ""
    text = f"{size(free)} free{left}, a checkpoint takes {size(one)}"
    fix = "free some space, choose a trainer.output_dir on another disk, or lower trainer.save_total_limit"
    if free - reserve < 2 * one:
        return red("disk", f"{text}: not even two fit, and a new one is written before an old one goes", fix)
    if free - reserve < kept * one:
        return yellow("disk", f"{text}: the {kept} that this run adds do not fit", fix)
    return green("disk", f"{text}: the {kept} that this run adds fit")


def checkpoints_kept(plan: Plan) -> int:
    """Return how many checkpoints a run keeps, at most: the newest ones, and the best one."""
    trainer = plan.config.trainer
    interval = trainer.save_steps if trainer.save_strategy == "steps" else trainer.max_steps
    evaluations = ceil(trainer.max_steps / trainer.eval_steps) if trainer.best_metric else 0
    saves = min(ceil(trainer.max_steps / interval) + evaluations, trainer.max_steps)
    limit = trainer.save_total_limit and trainer.save_total_limit + (trainer.best_metric is not None)
    return min(limit or saves, saves)


def _free_bytes(run_dir: Path) -> int:
    return shutil.disk_usage(existing_parent(run_dir)).free


# --- batch and memory ------------------------------------------------------------------------------------------------


def check_batch(plan: Plan, rows_in_store: int | None) -> Iterator[Finding]:
    """A step must be made of different rows, and of microbatches that are not needlessly small."""
    split, trainer = plan.split, plan.config.trainer
    factors = [(split.world_size, "rank"), (split.accumulation, "microbatche"), (split.rows_per_microbatch, "row")]
    named = [f"{count:,} {noun}s" if count > 1 else f"1 {noun.removesuffix('e')}" for count, noun in factors]
    text = f"{split.rows_per_step:,} rows a step = {' x '.join(named)}"
    if rows_in_store is not None and rows_in_store < split.rows_per_step:
        yield yellow("batch", f"{text}, but the corpus has about {rows_in_store:,}: each step repeats some",
                     "a smaller global batch, or more text")  # fmt: skip
    elif 2 * split.rows_per_microbatch < trainer.per_device_train_batch_size and split.accumulation > 1:
        share = split.accumulation * split.rows_per_microbatch
        yield yellow("batch", f"{text}: a rank's {share:,} rows have no larger divisor up to "
                              f"trainer.per_device_train_batch_size {trainer.per_device_train_batch_size}",
                     "choose a trainer.global_batch_size with more divisors in a new run")  # fmt: skip
    else:
        yield green("batch", text)


def _rows_in_store(plan: Plan) -> int | None:
    if not plan.store_ready:
        return None
    train = read_manifest(plan.store)["splits"]["train"]
    full_rows = ceil(train["tokens"] / plan.config.row_length)
    return full_rows if plan.config.datacollator.pack_sequences else max(full_rows, train["documents"])


def check_replicas(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """Hybrid sharding pays when a group of ranks that share a model lies within a machine."""
    parallel, ranks = config.parallel, config.launch.nproc_per_node or 1
    group = world_size // parallel.replicate
    if parallel.engine == "fsdp" and parallel.replicate > 1 and (group > ranks or ranks % group):
        text = f"parallel.replicate {parallel.replicate} shares a model among {group} ranks, across machines of {ranks}"
        fix = f"parallel.replicate {world_size // ranks} keeps it inside a machine"
        yield yellow("replicas", text, fix)


def check_memory(plan: Plan, device: int | None, where: str) -> Finding:
    """Compare the estimated peak with a device's memory; `where` names the device. What is surely held is exact."""
    config, split = plan.config, plan.split
    parts = peak_parts(config, split.world_size, split.rows_per_microbatch)
    peak = sum(parts.values()) - parts["host"]
    if device is None:
        hint = "set launch.gpu, e.g. h100-80gb, to compare it with what the nodes have"
        return green("memory", f"about {size(peak)} a rank at its peak, by estimate; {hint}")
    text = f"about {size(peak)} of {size(device)} {where}"
    held = static_bytes(config, split.world_size).device
    if held > device:
        return red("memory", f"weights and moments alone take {size(held)}: more than {size(device)} {where}",
                   _what_fits(plan, device))  # fmt: skip
    if peak > USABLE * device:
        return yellow("memory", f"it may not fit: {text}", _what_fits(plan, device))
    return green("memory", f"{text}, by estimate")


def _what_fits(plan: Plan, device: int) -> str:
    config = plan.config
    rows = largest_rows(config, plan.split.world_size, USABLE * device)
    steps = [f"trainer.per_device_train_batch_size {rows} fits"] if rows else []
    if not config.trainer.gradient_checkpointing:
        steps.append("trainer.gradient_checkpointing true")
    return " or ".join([*steps, "another engine or more ranks: `enc plan` compares them"])


def _device(plan: Plan, for_slurm: bool) -> tuple[int | None, str]:
    """Return the memory of a rank's device, as far as it is known from here, and what to call it."""
    launch, ranks = plan.config.launch, plan.config.launch.nproc_per_node or 1
    if launch.gpu and not plan.config.trainer.use_cpu:
        gpu = find_gpu(launch.gpu)
        return gpu.bytes, f"on each {gpu.name}"
    if for_slurm:
        asked = memory_asked(launch.slurm.mem) if plan.config.trainer.use_cpu else None
        return (asked // ranks, "of RAM for each rank (launch.slurm.mem)") if asked else (None, "")
    return device_bytes(plan.config, ranks), "on each GPU here" if plan.device == "cuda" else "of RAM for each rank"


def _check_ram(plan: Plan, for_slurm: bool) -> Iterator[Finding]:
    """A save copies the state to CPU memory, each tensor once over all ranks; offloaded state lives there."""
    available = memory_asked(plan.config.launch.slurm.mem) if for_slurm else ram_bytes()
    ranks, world = plan.config.launch.nproc_per_node or 1, plan.split.world_size
    parts = peak_parts(plan.config, world, plan.split.rows_per_microbatch)
    needed = {
        "offloaded state": ranks * parts["host"],
        "the copy that a save writes": checkpoint_bytes(plan.config) * ranks // world,
    }
    if plan.config.trainer.use_cpu or (plan.device == "cpu" and not for_slurm):
        needed["the model and its steps"] = ranks * (sum(parts.values()) - parts["host"])
    if available:
        where = "asked for by launch.slurm.mem" if for_slurm else "of RAM here"
        named = " and ".join(name for name, amount in needed.items() if amount)
        yield surroundings.check_ram(sum(needed.values()), available, where, named)


def memory_asked(text: str | None) -> int | None:
    """Return the bytes of SLURM's `--mem`, which counts in MB; None for nothing asked, or 0, which is all there is."""
    match = re.fullmatch(r"([0-9]+)([KMGT]?)", text or "")
    if not match or int(match[1]) == 0:
        return None
    return int(match[1]) * 2 ** {"K": 10, "": 20, "M": 20, "G": 30, "T": 40}[match[2]]


# --- accounts, caches, ports -----------------------------------------------------------------------------------------


def _check_wandb(config: RunConfig, variables: dict[str, str]) -> Iterator[Finding]:
    if not config.wandb.enabled or config.wandb.mode == "disabled":
        return
    if find_spec("wandb") is None:
        yield red("W&B", "wandb.enabled is true, but wandb is not installed", "pip install 'enc-toolkit[wandb]'")
    if config.wandb.mode == "online":
        file = Path(variables.get("NETRC") or home(variables) / ".netrc").expanduser()
        yield surroundings.check_wandb_login(variables, file, bool(config.launch.setup))


def _check_locks(config: RunConfig, variables: dict[str, str], mounts: list[Mount]) -> Iterator[Finding]:
    locks = build_locks(extensions_folder(variables))
    yield from surroundings.check_build_locks(locks, config.parallel.engine == "deepspeed", mounts)


def _hub_names(config: RunConfig) -> list[str]:
    """Return what is fetched from the hub to make the token store."""
    source = resolve_source(config.dataset)
    names = [f"the dataset {source.location}"] if source.kind == "hub" else []
    if config.tokenizer.train is None and local_folder(config.tokenizer) is None:
        names.append(f"the tokenizer {config.tokenizer.name}")
    return names


def _caches(plan: Plan, variables: dict[str, str]) -> dict[str, Path]:
    """Return the caches that this run uses."""
    config, folders = plan.config, surroundings.cache_folders(variables)
    uses = {
        "TRITON_CACHE_DIR": config.trainer.torch_compile or not config.trainer.use_cpu,
        "TORCH_EXTENSIONS_DIR": config.parallel.engine == "deepspeed",
        "HF_HOME": not plan.store_ready and bool(_hub_names(config)),
    }
    return {name: folder for name, folder in folders.items() if uses[name]}


def check_port(is_free: bool) -> Finding:
    """Ranks of one machine find each other through a port of 127.0.0.1."""
    if is_free:
        return green("port", "ranks can listen on 127.0.0.1")
    return red("port", "no TCP port of 127.0.0.1 can be used, so that ranks cannot find each other",
               "look at `ip addr show lo` and the limits of this container")  # fmt: skip
