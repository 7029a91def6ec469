"""What can be known to go wrong before a run is started or queued. No torch.

`preflight` looks at the files of a plan and calls the checks; each check is a function of what was observed and returns
findings: red is sure to fail, yellow may, green is a fact worth knowing. What depends on where the ranks will run is
checked beside it: `local_checks` here, and those of a job where its scheduler is (`enc.launcher.backends`).
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from math import ceil
from pathlib import Path

from enc.encoder.checkpoints.folder import list_checkpoints
from enc.encoder.config.schema import RunConfig
from enc.encoder.data.sources.find import held_out_sources, local_folder, resolve_source
from enc.encoder.data.sources.source import Source
from enc.encoder.errors import UsageError
from enc.encoder.gpus import find_gpu
from enc.encoder.quantities import size_text
from enc.encoder.sizing.memory import largest_rows
from enc.launcher.checks import environment, probe_software
from enc.launcher.checks.findings import Finding, green, red, yellow
from enc.launcher.machine.build_locks import build_locks, extensions_folder, home
from enc.launcher.machine.facts import MachineFacts
from enc.launcher.machine.mounts import Mount, existing_parent
from enc.launcher.machine.ports import can_bind_port
from enc.launcher.planning.engine_choice import USABLE
from enc.launcher.planning.plan import Plan

Check = Callable[[], Iterable[Finding]]
PlaceChecks = Callable[[Plan, MachineFacts], list[Finding]]  # of where the ranks of a plan will run


def preflight(plan: Plan, facts: MachineFacts) -> list[Finding]:
    """Check what a plan needs wherever its ranks run. Takes about 0.1 s."""
    variables = {**facts.environment, **plan.config.launch.env}
    return run_checks({
        "run folder": lambda: [check_folder("trainer.output_dir", "run folder", plan.run_dir)],
        "TensorBoard": lambda: _check_tensorboard(plan),
        "text": lambda: check_text(plan),
        "tokenizer": lambda: check_tokenizer(plan),
        "packages": lambda: check_packages(plan.config, lambda name: find_spec(name) is not None),
        "kernels": lambda: check_kernels(plan.config, plan.device),
        "disk": lambda: [check_disk(plan, _free_bytes(plan.run_dir), len(list_checkpoints(plan.run_dir)))],
        "batch": lambda: check_batch(plan, _rows_in_store(plan)),
        "replicas": lambda: check_sharding_groups(plan.config, plan.split.world_size),
        "W&B": lambda: _check_wandb(plan.config, variables),
        "hub": lambda: environment.check_hub([] if plan.store_ready else _hub_names(plan.config), variables),
        "build lock": lambda: _check_locks(plan.config, variables, facts.mounts),
        "caches": lambda: environment.check_caches(_caches(plan, variables), facts.mounts),
        "open files": lambda: [environment.check_open_files(*facts.open_files)],
    })  # fmt: skip


def local_checks(plan: Plan, facts: MachineFacts) -> list[Finding]:
    """Check whether this machine can hold the ranks of a plan."""
    return run_checks({
        "memory": lambda: [check_memory(plan, plan.device_bytes, _device_name(plan))],
        "RAM": lambda: check_ram(plan, facts.ram_bytes, "of RAM here", plan.device == "cpu", "fewer ranks here"),
        "port": lambda: [check_port(can_bind_port())],
        "C++ compiler": lambda: probe_software.find_compiler(plan.config, facts),
    })  # fmt: skip


def run_checks(checks: Mapping[str, Check]) -> list[Finding]:
    """Return what checks find, by name, each sentence once; one that cannot be made is a finding too."""
    found = [finding for what, check in checks.items() for finding in _carefully(what, check)]
    return list({(finding.level, finding.text): finding for finding in reversed(found)}.values())[::-1]


def _carefully(what: str, check: Check) -> list[Finding]:
    try:
        return list(check())
    except UsageError as error:
        return [red(what, str(error))]
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        return [yellow(what, f"could not be checked: {error.strerror or error}{place}", "look at its permissions")]


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


def _check_tensorboard(plan: Plan) -> Iterator[Finding]:
    if plan.config.trainer.tensorboard_dir:
        yield check_folder("trainer.tensorboard_dir", "TensorBoard", plan.cwd / plan.config.trainer.tensorboard_dir)


def check_text(plan: Plan) -> Iterator[Finding]:
    """The token store must be readable, or what it will be made from, and its place writable."""
    if plan.store_facts.manifest:
        files = [plan.store / name for name in ("manifest.json", *plan.store_facts.manifest["files"])]
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
    one, reserve = plan.checkpoint_bytes, plan.config.trainer.min_free_disk_gb * 1e9
    kept = max(2, checkpoints_kept(plan) + 1 - existing)
    left = f" with trainer.min_free_disk_gb {reserve / 1e9:g} left free" if reserve else ""
    text = f"{size_text(free)} free{left}, a checkpoint takes {size_text(one)}"
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


# --- software --------------------------------------------------------------------------------------------------------


def check_packages(config: RunConfig, is_there: Callable[[str], bool]) -> Iterator[Finding]:
    """The engine's own package must be installed."""
    if config.parallel.engine == "deepspeed" and not is_there("deepspeed"):
        yield red("packages", "parallel.engine deepspeed needs DeepSpeed, which is not installed",
                  "pip install deepspeed, or use parallel.engine fsdp")  # fmt: skip


def check_kernels(config: RunConfig, device: str) -> Iterator[Finding]:
    """Kernels that the config insists on must exist for the device of the ranks."""
    asked = {"attn_backend": "flash_attn_varlen", "kernel_backend": "fused"}
    for key, value in asked.items():
        if device == "cpu" and getattr(config.model, key) == value:
            text = f"the config asks for model.{key}: {value}, but there are no fused kernels for the CPU"
            yield red("kernels", text, f"model.{key} auto trains with what there is")


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
    if plan.store_facts.manifest is None:
        return None
    train: dict[str, int] = plan.store_facts.manifest["splits"]["train"]
    full_rows = ceil(train["tokens"] / plan.config.row_length)
    return full_rows if plan.config.datacollator.pack_sequences else max(full_rows, train["documents"])


def check_sharding_groups(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """Hybrid sharding pays when a group of ranks that share a model lies within a machine."""
    parallel, ranks = config.parallel, config.launch.nproc_per_node or 1
    group = world_size // parallel.replicate
    if parallel.engine == "fsdp" and parallel.replicate > 1 and (group > ranks or ranks % group):
        text = f"parallel.replicate {parallel.replicate} shares a model among {group} ranks, across machines of {ranks}"
        fix = f"parallel.replicate {world_size // ranks} keeps it inside a machine"
        yield yellow("replicas", text, fix)


def check_memory(plan: Plan, device: int | None, where: str) -> Finding:
    """Compare the estimated peak with a device's memory; `where` names the device. What is surely held is exact."""
    peak, held = sum(plan.memory.values()) - plan.memory["host"], plan.held_bytes
    if device is None:
        hint = "set launch.gpu, e.g. h100-80gb, to compare it with what the nodes have"
        return green("memory", f"about {size_text(peak)} a rank at its peak, by estimate; {hint}")
    text = f"about {size_text(peak)} of {size_text(device)} {where}"
    if held > device:
        return red("memory", f"weights and moments alone take {size_text(held)}: more than {size_text(device)} {where}",
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


def _device_name(plan: Plan) -> str:
    """Return what to call the memory of a rank's device."""
    if plan.config.launch.gpu and not plan.config.trainer.use_cpu:
        return f"on each {find_gpu(plan.config.launch.gpu).name}"
    return "on each GPU here" if plan.device == "cuda" else "of RAM for each rank"


def check_ram(plan: Plan, available: int | None, where: str, holds_model: bool, more: str) -> Iterator[Finding]:
    """A save copies the state to CPU memory, each tensor once over all ranks; offloaded state lives there.

    `holds_model`: the ranks run on CPUs, so that the model and its steps are in the same memory. `more` is how a run
    gets more of it.
    """
    ranks, parts = plan.config.launch.nproc_per_node or 1, plan.memory
    needed = {
        "offloaded state": ranks * parts["host"],
        "the copy that a save writes": plan.checkpoint_bytes * ranks // plan.split.world_size,
    }
    if plan.config.trainer.use_cpu or holds_model:
        needed["the model and its steps"] = ranks * (sum(parts.values()) - parts["host"])
    if available:
        named = " and ".join(name for name, amount in needed.items() if amount)
        yield environment.ram_finding(sum(needed.values()), available, where, named, more)


# --- accounts, caches, ports -----------------------------------------------------------------------------------------


def _check_wandb(config: RunConfig, variables: Mapping[str, str]) -> Iterator[Finding]:
    if not config.wandb.enabled or config.wandb.mode == "disabled":
        return
    if find_spec("wandb") is None:
        yield red("W&B", "wandb.enabled is true, but wandb is not installed", "pip install 'enc-toolkit[wandb]'")
    if config.wandb.mode == "online":
        file = Path(variables.get("NETRC") or home(variables) / ".netrc").expanduser()
        yield environment.check_wandb_login(variables, file, bool(config.launch.setup))


def _check_locks(config: RunConfig, variables: Mapping[str, str], mounts: Sequence[Mount]) -> Iterator[Finding]:
    locks = build_locks(extensions_folder(variables))
    yield from environment.check_build_locks(locks, config.parallel.engine == "deepspeed", mounts)


def _hub_names(config: RunConfig) -> list[str]:
    """Return what is fetched from the hub to make the token store."""
    source = resolve_source(config.dataset)
    names = [f"the dataset {source.location}"] if source.kind == "hub" else []
    if config.tokenizer.train is None and local_folder(config.tokenizer) is None:
        names.append(f"the tokenizer {config.tokenizer.name}")
    return names


def _caches(plan: Plan, variables: Mapping[str, str]) -> dict[str, Path]:
    """Return the caches that this run uses."""
    config, folders = plan.config, environment.cache_folders(variables)
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
