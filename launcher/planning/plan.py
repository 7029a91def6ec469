"""Every number that follows from a config, derived once, before anything is started. No torch.

    config, MachineFacts, StoreFacts --make_plan--> Plan
    config, MachineFacts --plan_run--> Plan

The first is a pure function; the second opens the token store for it, and reads what else a config names.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from enc.encoder.config.checks import rule_problems, unused_settings
from enc.encoder.config.messages import raise_problems
from enc.encoder.config.schema import RunConfig
from enc.encoder.config.yaml_source import Problem
from enc.encoder.engine.settings import check_replicas, engine_files, engine_name, own_settings
from enc.encoder.errors import UsageError
from enc.encoder.models import first_weights
from enc.encoder.models.vocabulary import padded_vocab_size
from enc.encoder.printable import Say
from enc.encoder.sizing import sizes
from enc.encoder.sizing.batch_split import BatchSplit, split_batch
from enc.encoder.sizing.memory import peak_parts, static_bytes
from enc.launcher.machine.facts import MachineFacts
from enc.launcher.planning.engine_choice import choose_engine
from enc.launcher.planning.precision import choose_precision
from enc.launcher.planning.ranks import device_bytes, device_of, ranks_per_node, usable_gpus
from enc.launcher.planning.token_store import StoreFacts, look_at_store, make_store


@dataclass(frozen=True)
class Plan:
    """A run as it will be: the resolved config and what follows from it."""

    config: RunConfig
    asked: RunConfig  # with its ranks and batch, before the tokenizer's vocabulary and an engine in the place of `auto`
    cwd: Path
    run_dir: Path
    store_facts: StoreFacts
    num_tokens: int  # tokens of the tokenizer; known for sure once the store is ready
    split: BatchSplit
    device: str
    device_bytes: int | None  # memory that each rank's device has, if that is known from here
    engine: str  # with what tells it from its variants
    engine_reason: str
    engine_files: dict[str, str]  # what the engine reads beside `config.yaml`: {file name: text}
    memory: dict[str, int]  # estimated peak of one rank by part, in bytes; `host` is beside it, in CPU memory
    held_bytes: int  # of the device, between two steps: exact
    checkpoint_bytes: int
    unused: tuple[str, ...]  # a sentence for each setting without effect
    precision_reason: str
    first_weights: tuple[str, ...] = ()  # a sentence for each part of them that `model.init_from` does not give

    @property
    def store(self) -> Path:
        """Where the tokens are or will be."""
        return self.store_facts.path

    @property
    def store_ready(self) -> bool:
        return self.store_facts.manifest is not None

    @property
    def asked_engine(self) -> str:
        return self.asked.parallel.engine

    @property
    def evaluates(self) -> bool:
        """Whether there is text to evaluate on."""
        return _holds_out(self.config, self.store_facts)

    @property
    def precision(self) -> str:
        """What matrix products are computed in."""
        return "bf16" if self.config.trainer.bf16 else "fp32"

    @property
    def tokens_per_step(self) -> int:
        """Places for tokens in a step; packed rows are at least 99 % full."""
        return self.split.rows_per_step * self.config.row_length

    def as_dict(self) -> dict[str, Any]:
        """Return the plan's numbers with their units in the names."""
        model, trainer = self.config.model, self.config.trainer
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
            "corpus_tokens": self.store_facts.train_tokens,
            "vocab_size": model.vocab_size,
            "parameters": sizes.num_parameters(self.config),
            "memory_mb": {name: round(size / 2**20, 1) for name, size in self.memory.items()},
            "checkpoint_mb": round(self.checkpoint_bytes / 2**20, 1),
        }


# --- from a config ---------------------------------------------------------------------------------------------------


def plan_run(config: RunConfig, facts: MachineFacts) -> Plan:
    """Read the files that a config names and plan its run. Raises UsageError when they do not go together."""
    store = look_at_store(config.dataset)
    return _with_first_weights(make_plan(_with_own_json(config, facts), facts, store))


def run_folder(config: RunConfig, facts: MachineFacts) -> Path:
    """Return the folder of a config's run."""
    return facts.cwd / config.trainer.output_dir


def make_plan(config: RunConfig, facts: MachineFacts, store: StoreFacts) -> Plan:
    """Resolve a config into a plan. Raises UsageError when its numbers do not go together."""
    per_node, split = _ranks_and_batch(config, facts)
    precision, precision_reason = choose_precision(config, facts)
    asked = config.changed({
        "trainer.mixed_precision": precision,
        "trainer.global_batch_size": split.rows_per_step, "launch.nproc_per_node": per_node,
        "launch.nodes": config.launch.num_nodes,
    })  # fmt: skip
    plan = Plan(
        config=asked, asked=asked, cwd=facts.cwd, run_dir=run_folder(config, facts), store_facts=store,
        num_tokens=0, split=split, device=device_of(config, facts),
        device_bytes=device_bytes(config, per_node, facts), engine="", engine_reason="", engine_files={}, memory={},
        held_bytes=0, checkpoint_bytes=0, unused=(), precision_reason=precision_reason,
    )  # fmt: skip
    return with_store(plan, store)


def with_store(plan: Plan, store: StoreFacts) -> Plan:
    """Return a plan with the vocabulary of a token store, which may have been made since, and what follows from it."""
    _check_best(plan.asked, store)
    num_tokens = store.num_tokens or _expected_tokens(plan.asked)
    pad_id = plan.asked.model.pad_token_id if store.pad_token_id is None else store.pad_token_id
    vocabulary = {"model.vocab_size": padded_vocab_size(num_tokens), "model.pad_token_id": pad_id}
    plan = replace(plan, store_facts=store, num_tokens=num_tokens)
    if plan.engine and plan.config.changed(vocabulary) == plan.config:
        return plan
    return _with_engine(plan, plan.asked.changed(vocabulary))


def with_tokens(plan: Plan, say: Say) -> Plan:
    """Make the token store of a plan, or check every byte of the one that is there."""
    made = make_store(plan.config, say, plan.store_facts, plan.run_dir)
    return plan if plan.store_ready else after_tokenising(plan, made)


def after_tokenising(plan: Plan, store: StoreFacts) -> Plan:
    """Return a plan with the token store that was made for it. Raises UsageError when first weights do not fit it."""
    return _with_first_weights(with_store(plan, store))


def _ranks_and_batch(config: RunConfig, facts: MachineFacts) -> tuple[int, BatchSplit]:
    """Return the ranks on each machine, and how all of them share a step."""
    per_node = ranks_per_node(config, facts)
    world_size = config.launch.num_nodes * per_node
    check_replicas(config.parallel, world_size)
    gpus = 0 if config.launch.on_cluster else usable_gpus(config, facts)
    if 0 < gpus < per_node:
        raise UsageError(f"launch.nproc_per_node is {per_node}, but this machine has {gpus} GPUs; a rank needs one.")
    return per_node, split_batch(config.trainer, world_size)


def _holds_out(config: RunConfig, store: StoreFacts) -> bool:
    """Tell whether a token store has, or will have, text to evaluate on."""
    keys = ("validation_file", "eval_split", "validation_split", "eval_samples")
    if store.manifest:
        return "eval" in store.manifest["splits"]
    return any(getattr(config.dataset, key) for key in keys)


def _check_best(config: RunConfig, store: StoreFacts) -> None:
    """Raise UsageError when a best checkpoint is to be chosen and the token store has or will have nothing for it."""
    if config.trainer.best_metric and not _holds_out(config, store):
        raise UsageError(
            f"The best checkpoint is chosen by {config.trainer.best_metric}, but the token store {store.path} has no "
            "text to evaluate on. Set dataset.eval_samples, dataset.validation_split or dataset.validation_file and "
            "preprocess into another folder, or set trainer.metric_for_best_model null and trainer.save_strategy steps."
        )


def _with_engine(plan: Plan, config: RunConfig) -> Plan:
    """Return a plan with its engine chosen for a config whose vocabulary is settled, and what that engine needs.

    Raises UsageError when other settings do not go with the engine that `auto` took.
    """
    split = plan.split
    engine, reason = choose_engine(config, split.world_size, plan.device_bytes)
    config = config.changed({"parallel.engine": engine})
    memory = peak_parts(config, split.world_size, split.rows_per_microbatch)
    held, checkpoint = static_bytes(config, split.world_size).device, sizes.checkpoint_bytes(config)
    why = f" (parallel.engine auto took {engine}: {reason})" if plan.asked_engine == "auto" else ""
    raise_problems("The config", [Problem(keys[0], f"{text}{why}") for keys, text in rule_problems(config)])
    unused = tuple(unused_settings(config))
    if engine == "deepspeed":
        config = config.changed({"parallel.deepspeed_config": own_settings(config, split) or None})
    return replace(
        plan, config=config, engine=engine_name(config), engine_reason=reason, memory=memory, held_bytes=held,
        checkpoint_bytes=checkpoint, unused=unused, engine_files=engine_files(config, split),
    )  # fmt: skip


def _expected_tokens(config: RunConfig) -> int:
    return config.tokenizer.train.vocab_size if config.tokenizer.train else config.model.vocab_size


def with_expected_vocabulary(config: RunConfig) -> RunConfig:
    """Return the config with the embedding rows that it will have, as far as is known without a token store."""
    return config.changed({"model.vocab_size": padded_vocab_size(_expected_tokens(config))})


# --- from the files that it names ------------------------------------------------------------------------------------


def _with_own_json(config: RunConfig, facts: MachineFacts) -> RunConfig:
    """Return the config with what the user's own DeepSpeed JSON adds in the place of that file's name."""
    parallel = config.parallel
    if not isinstance(parallel.deepspeed_config, str) or parallel.engine not in ("deepspeed", "auto"):
        return config
    _, split = _ranks_and_batch(config, facts)
    settled = config.changed({"trainer.mixed_precision": choose_precision(config, facts)[0]})
    return config.changed({"parallel.deepspeed_config": own_settings(settled, split)})


def _with_first_weights(plan: Plan) -> Plan:
    """Return a plan with what the folder of first weights (`model.init_from`) lacks.

    Raises UsageError when that folder does not go with the run.
    """
    if plan.config.trainer.resume_from_checkpoint:
        return plan
    model, store, trains_tokenizer = plan.config.model, plan.store_facts, plan.config.tokenizer.train is not None
    first_weights.check(model, trains_tokenizer, store.num_tokens, store.tokenizer_dir)
    return replace(plan, first_weights=tuple(first_weights.notes(model)))
