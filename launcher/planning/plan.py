"""Every number that follows from a config, derived once, before anything is started. No torch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enc.encoder.config.checks import rule_problems, unused_settings
from enc.encoder.config.launch import SlurmConfig
from enc.encoder.config.messages import raise_problems
from enc.encoder.config.schema import RunConfig
from enc.encoder.config.yaml_source import Problem
from enc.encoder.data.preprocess import store_path
from enc.encoder.data.store import TokenStore, data_fingerprint, read_manifest
from enc.encoder.engine.settings import check_replicas, engine_files, engine_name, own_settings
from enc.encoder.errors import UsageError
from enc.encoder.models import first_weights
from enc.encoder.models.vocabulary import padded_vocab_size
from enc.encoder.sizing.batch_split import BatchSplit, split_batch
from enc.encoder.sizing.memory import peak_parts
from enc.encoder.sizing.sizes import checkpoint_bytes, num_parameters
from enc.launcher.machine.devices import default_ranks, device_bytes, num_gpus
from enc.launcher.planning.engine_choice import choose_engine


@dataclass(frozen=True)
class Plan:
    """A run as it will be: the resolved config and what follows from it."""

    config: RunConfig
    run_dir: Path
    store: Path
    store_ready: bool
    num_tokens: int  # tokens of the tokenizer; known for sure once the store is ready
    split: BatchSplit
    device: str
    asked_engine: str
    engine_reason: str
    train_tokens: int | None  # of the corpus, without special tokens

    @property
    def tokens_per_step(self) -> int:
        """Places for tokens in a step; packed rows are at least 99 % full."""
        return self.split.rows_per_step * self.config.row_length

    def as_dict(self) -> dict[str, Any]:
        """Return the plan's numbers with their units in the names."""
        model, trainer = self.config.model, self.config.trainer
        memory = peak_parts(self.config, self.split.world_size, self.split.rows_per_microbatch)
        return {
            "run_dir": str(self.run_dir),
            "store": str(self.store),
            "store_ready": self.store_ready,
            "device": self.device,
            "engine": self.config.parallel.engine,
            "engine_reason": self.engine_reason,
            "world_size": self.split.world_size,
            "gradient_accumulation_steps": self.split.accumulation,
            "rows_per_microbatch": self.split.rows_per_microbatch,
            "global_batch_size": self.split.rows_per_step,
            "row_length": self.config.row_length,
            "tokens_per_step": self.tokens_per_step,
            "max_steps": trainer.max_steps,
            "total_tokens": self.tokens_per_step * trainer.max_steps,
            "corpus_tokens": self.train_tokens,
            "vocab_size": model.vocab_size,
            "parameters": num_parameters(model),
            "memory_mb": {name: round(size / 2**20, 1) for name, size in memory.items()},
            "checkpoint_mb": round(checkpoint_bytes(self.config) / 2**20, 1),
        }


def make_plan(config: RunConfig) -> Plan:
    """Resolve a config into a plan. Raises UsageError when its numbers do not go together."""
    per_node = default_ranks(config)
    world_size = config.launch.num_nodes * per_node
    _check_ranks(config, per_node, world_size)
    split = split_batch(config.trainer, world_size)
    store = store_path(config.dataset).absolute()
    manifest = TokenStore.open(store).manifest if store.exists() else None
    _check_best(config, store, manifest)
    num_tokens = manifest["tokenizer"]["num_tokens"] if manifest else _expected_tokens(config)
    if not config.trainer.resume_from_checkpoint:
        tokenizer_dir = store / "tokenizer" if manifest else None
        trained = config.tokenizer.train is not None
        first_weights.check(config.model, trained, num_tokens if manifest else None, tokenizer_dir)
    pad_id = json.loads((store / "tokenizer_info.json").read_text())["pad_token_id"] if manifest else None
    updates: dict[str, Any] = {
        "model.vocab_size": padded_vocab_size(num_tokens),
        "model.pad_token_id": config.model.pad_token_id if pad_id is None else pad_id,
        "trainer.global_batch_size": split.rows_per_step,
        "launch.nproc_per_node": per_node,
        "launch.nodes": config.launch.num_nodes,
    }
    tokens = manifest["splits"]["train"]["tokens"] if manifest else None
    device = "cuda" if _has_gpus(config) else "cpu"
    asked = config.parallel.engine
    config, reason = _with_engine(config.changed(updates), split, device_bytes(config, per_node))
    run_dir = Path(config.trainer.output_dir).absolute()
    return Plan(config, run_dir, store, manifest is not None, num_tokens, split, device, asked, reason, tokens)


def choose_scheduler(config: RunConfig, slurm_installed: bool) -> RunConfig:
    """Return the config with `launch.scheduler` resolved: SLURM for what names nodes, a site or SLURM settings.

    One node stays one node where there is no SLURM: the run then starts on this machine.
    """
    launch = config.launch
    if launch.scheduler == "local" and launch.num_nodes > 1:
        raise UsageError(
            f"launch.scheduler is local, but launch.nodes is {launch.nodes}: this machine is one. Add --nodes 1, with "
            "--nproc-per-node for the ranks that you want here."
        )
    if launch.scheduler != "auto":
        return config
    asks = launch.site is not None or launch.slurm != SlurmConfig()
    nodes = launch.num_nodes > 1 or (launch.nodes is not None and slurm_installed)
    return config.changed({"launch.scheduler": "slurm" if asks or nodes else "local"})


def _has_gpus(config: RunConfig) -> bool:
    if config.launch.scheduler == "slurm":
        return not config.trainer.use_cpu
    return num_gpus(config) > 0


def _check_ranks(config: RunConfig, per_node: int, world_size: int) -> None:
    check_replicas(config, world_size)
    gpus = 0 if config.launch.scheduler == "slurm" else num_gpus(config)
    if 0 < gpus < per_node:
        raise UsageError(f"launch.nproc_per_node is {per_node}, but this machine has {gpus} GPUs; a rank needs one.")


def _check_best(config: RunConfig, store: Path, manifest: dict[str, Any] | None) -> None:
    """Raise UsageError when a best checkpoint is to be chosen and the token store has or will have nothing for it."""
    keys = ("validation_file", "eval_split", "validation_split", "eval_samples")
    evaluates = "eval" in manifest["splits"] if manifest else any(getattr(config.dataset, key) for key in keys)
    if config.trainer.best_metric and not evaluates:
        raise UsageError(
            f"The best checkpoint is chosen by {config.trainer.best_metric}, but the token store {store} has no text "
            "to evaluate on. Set dataset.eval_samples, dataset.validation_split or dataset.validation_file and "
            "preprocess into another folder, or set trainer.metric_for_best_model null and trainer.save_strategy steps."
        )


def _with_engine(config: RunConfig, split: BatchSplit, device_memory: int | None) -> tuple[RunConfig, str]:
    """Return the config with its engine chosen and its own DeepSpeed JSON read, and why that engine.

    Raises UsageError when other settings do not go with the engine that `auto` took.
    """
    asked = config.parallel.engine
    engine, reason = choose_engine(config, split.world_size, device_memory)
    config = config.changed({"parallel.engine": engine})
    why = f" (parallel.engine auto took {engine}: {reason})" if asked == "auto" else ""
    raise_problems("The config", [Problem(keys[0], f"{text}{why}") for keys, text in rule_problems(config)])
    if engine == "deepspeed":
        config = config.changed({"parallel.deepspeed_config": own_settings(config, split) or None})
    return config, reason


def _expected_tokens(config: RunConfig) -> int:
    return config.tokenizer.train.vocab_size if config.tokenizer.train else config.model.vocab_size


def with_expected_vocabulary(config: RunConfig) -> RunConfig:
    """Return the config with the embedding rows that it will have, as far as is known without a token store."""
    return config.changed({"model.vocab_size": padded_vocab_size(_expected_tokens(config))})


def render(plan: Plan) -> dict[str, str]:
    """Return the files of a run folder that the trainer reads, as text; a pure function of the plan."""
    return {"config.yaml": self_contained(plan).to_yaml(), **engine_files(plan.config, plan.split)}


def self_contained(plan: Plan) -> RunConfig:
    """Return the plan's config with absolute folders, and text and tokenizer taken from the token store.

    A run can then go on from any working directory, whatever became of its sources and its site profile.
    """
    updates: dict[str, Any] = {
        "trainer.output_dir": str(plan.run_dir), "dataset.path": str(plan.store), "dataset.validation_file": None,
        "dataset.test_file": None, "launch.site": None,
    }  # fmt: skip
    if plan.config.trainer.tensorboard_dir:
        updates["trainer.tensorboard_dir"] = str(Path(plan.config.trainer.tensorboard_dir).absolute())
    if plan.config.tokenizer.train is None:
        updates["tokenizer.path"] = str(plan.store / "tokenizer")
    if folder := first_weights.folder_of(plan.config.model):
        updates["model.init_from"] = str(folder.absolute())
    return plan.config.changed(updates)


def plan_notes(plan: Plan) -> list[str]:
    """Return what a person should know before the run starts: settings without effect, weights that are not given."""
    goes_on = plan.config.trainer.resume_from_checkpoint
    found = [] if goes_on else first_weights.notes(plan.config.model)
    return [f"Note: {text}" for text in (*unused_settings(plan.config), *found)]


def store_fingerprint(plan: Plan) -> str | None:
    """Return the fingerprint of a plan's tokens, or None while they are not made."""
    return data_fingerprint(read_manifest(plan.store)) if plan.store_ready else None


def plan_table(plan: Plan) -> list[tuple[str, str]]:
    """Return the plan as (name, text) lines for a person."""
    facts, split, config = plan.as_dict(), plan.split, plan.config
    total = facts["total_tokens"]
    epochs = f", {total / plan.train_tokens:.1f} epochs" if plan.train_tokens else ""
    return [
        ("run folder", str(plan.run_dir)),
        ("token store", f"{plan.store}" + ("" if plan.store_ready else " (to be made first)")),
        ("model", f"{config.model.type} {config.model.num_hidden_layers} x {config.model.hidden_size}, "
                  f"{facts['parameters'] / 1e6:.1f} M parameters, vocabulary {facts['vocab_size']}"),
        ("world", f"{_machines(config)}{split.world_size} process{'es' if split.world_size > 1 else ''} on "
                  f"{plan.device}, "
                  f"{'bf16' if config.trainer.mixed_precision == 'bf16' else 'fp32'}"),
        ("engine", f"{engine_name(config)}, {plan.engine_reason}"),
        ("batch", f"{split.rows_per_step} rows = {split.world_size} ranks x {split.accumulation} microbatches "
                  f"x {split.rows_per_microbatch} rows"),
        ("step", f"{plan.tokens_per_step:,} tokens ({config.row_length} a row"
                 f"{', packed' if config.datacollator.pack_sequences else ', at most'})"),
        ("steps", f"{config.trainer.max_steps:,}, at most {total / 1e6:,.1f} M tokens{epochs}"),
        ("memory a rank", _memory_text(facts["memory_mb"])),
        ("checkpoint", f"{facts['checkpoint_mb']:,.1f} MB each, {config.trainer.save_total_limit or 'all'} kept"),
    ]  # fmt: skip


def _machines(config: RunConfig) -> str:
    nodes = config.launch.num_nodes
    return f"{nodes} node{'s' if nodes > 1 else ''} of SLURM, " if config.launch.scheduler == "slurm" else ""


def _memory_text(parts: dict[str, float]) -> str:
    host = f"; {parts['host']:,.0f} MB of RAM" if parts["host"] else ""
    named = ", ".join(f"{name} {size:,.0f}" for name, size in parts.items() if size >= 0.5 and name != "host")
    return f"about {sum(parts.values()) - parts['host']:,.0f} MB: {named}{host}"
