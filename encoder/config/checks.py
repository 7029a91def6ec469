"""Rules of a config that span several fields, and settings without effect.

Each rule yields (keys involved, what is wrong and what to do); the first key is the one that is shown.
"""

from collections.abc import Iterator

from enc.encoder.config.launch_checks import Broken, launch_rules
from enc.encoder.config.schema import RunConfig
from enc.encoder.engine.config import ParallelConfig
from enc.encoder.models.registry import ARCHITECTURES, architecture_of
from enc.encoder.tasks import TASKS


def rule_problems(config: RunConfig) -> Iterator[Broken]:
    """Yield every broken rule of a config."""
    yield from _model_rules(config)
    yield from _objective_rules(config)
    yield from _data_rules(config)
    yield from _schedule_rules(config)
    yield from _trainer_rules(config)
    yield from _parallel_rules(config)
    yield from _task_rules(config)
    yield from launch_rules(config)


def _model_rules(config: RunConfig) -> Iterator[Broken]:
    model = config.model
    keys = ("model.num_attention_heads", "model.hidden_size")
    if model.hidden_size % model.num_attention_heads:
        good = [h for h in range(1, model.hidden_size + 1) if model.hidden_size % h == 0]
        near = sorted(good, key=lambda h: abs(h - model.num_attention_heads))[:3]
        yield (
            keys,
            (
                f"is {model.num_attention_heads}, which does not divide model.hidden_size {model.hidden_size}; "
                f"{', '.join(map(str, sorted(near)))} would"
            ),
        )
    yield from architecture_of(model).rules(model)


def _objective_rules(config: RunConfig) -> Iterator[Broken]:
    if config.objective not in ("auto", *architecture_of(config.model).objectives):
        able = {name: other.title for name, other in ARCHITECTURES.items() if config.objective in other.objectives}
        yield (
            ("objective", "model.type"),
            f"is {config.objective}, whose attention only an {' or '.join(able.values())} has; set model.type "
            f"{' or '.join(able)}, or objective {architecture_of(config.model).objectives[0]}",
        )
    collator = config.datacollator
    if collator.mask_replace_prob + collator.random_replace_prob > 1:
        yield (
            ("datacollator.random_replace_prob", "datacollator.mask_replace_prob"),
            f"is {collator.random_replace_prob:g}, which with mask_replace_prob {collator.mask_replace_prob:g} is more "
            "than 1",
        )


def _data_rules(config: RunConfig) -> Iterator[Broken]:
    limit = config.model.max_position_embeddings
    packs = config.datacollator.pack_sequences and config.datacollator.max_length
    key = "datacollator.max_length" if packs else "dataset.max_seq_length"
    if config.row_length > limit:
        yield (
            (key, "model.max_position_embeddings"),
            (
                f"is {config.row_length}, but the model has positions for {limit} tokens; "
                f"raise model.max_position_embeddings or lower {key}"
            ),
        )
    if config.row_length < 8:
        yield (key,), f"is {config.row_length}; a row needs at least 8 tokens"
    dataset = config.dataset
    if dataset.eval_split and dataset.validation_split:
        yield ("dataset.validation_split", "dataset.eval_split"), "and dataset.eval_split exclude each other; keep one"
    if dataset.validation_split and dataset.eval_samples:
        yield (
            ("dataset.eval_samples", "dataset.validation_split"),
            ("and dataset.validation_split exclude each other; keep one"),
        )
    for key in ("eval_split", "validation_split", "eval_samples"):
        if dataset.validation_file and getattr(dataset, key):
            yield (
                ("dataset.validation_file", f"dataset.{key}"),
                f"and dataset.{key} exclude each other; keep one and set the other to null",
            )
    if dataset.test_file and dataset.test_samples:
        yield (
            ("dataset.test_file", "dataset.test_samples"),
            "and dataset.test_samples exclude each other; keep one and set the other to null",
        )
    train = config.tokenizer.train
    if train and train.limit_alphabet and train.limit_alphabet > train.vocab_size // 2 - 5:
        yield (
            ("tokenizer.train.limit_alphabet", "tokenizer.train.vocab_size"),
            f"is {train.limit_alphabet}, and each character may take two of the {train.vocab_size} tokens; lower it or "
            "raise tokenizer.train.vocab_size",
        )
    if not (dataset.name or dataset.path):
        yield ("dataset.name", "dataset.path"), "is empty, and so is dataset.path; name a source"


def _schedule_rules(config: RunConfig) -> Iterator[Broken]:
    scheduler = config.scheduler
    total = scheduler.total_steps or config.trainer.max_steps
    if (
        scheduler.name == "warmup_stable_decay"
        and scheduler.decay_percent is None
        and scheduler.decay_steps is not None
    ):
        keys = ("scheduler.decay_steps", "trainer.max_steps", "scheduler.total_steps")
        if scheduler.decay_steps > total:
            yield keys, f"is {scheduler.decay_steps}, longer than the whole schedule of {total} steps"


def _trainer_rules(config: RunConfig) -> Iterator[Broken]:
    trainer = config.trainer
    key = "trainer.global_batch_size"
    ranks = config.launch.num_nodes * (config.launch.nproc_per_node or 1)
    if trainer.global_batch_size and trainer.global_batch_size < ranks:
        yield (
            (key, "launch.nproc_per_node"),
            f"is {trainer.global_batch_size}, but each of the {ranks} ranks needs a row",
        )
    if trainer.save_strategy == "steps" and trainer.save_steps == 0:
        yield ("trainer.save_steps",), "is 0; use trainer.save_strategy no to save at the end only"
    if trainer.resume_from_checkpoint == "":
        yield ("trainer.resume_from_checkpoint",), "is empty; write latest, best, a step, a checkpoint folder or null"
    if trainer.best_metric and trainer.eval_strategy == "no":
        key = "metric_for_best_model" if trainer.metric_for_best_model else "save_strategy"
        yield (
            (f"trainer.{key}", "trainer.eval_strategy"),
            f"is {getattr(trainer, key)}, but trainer.eval_strategy no evaluates nothing; set it to steps",
        )


def _task_rules(config: RunConfig) -> Iterator[Broken]:
    task, metric = TASKS[config.task], config.trainer.metric_for_best_model
    if metric and metric not in task.eval_metrics:
        key = "trainer.metric_for_best_model"
        yield (key, "task"), f"is {metric}, but {task.title} is measured by {', '.join(task.eval_metrics)}"
    yield from task.rules(config)


def _parallel_rules(config: RunConfig) -> Iterator[Broken]:
    parallel, engine = config.parallel, config.parallel.engine
    if parallel.offload == "optimizer" and engine in ("ddp", "fsdp"):
        other = "; fsdp offloads everything or nothing: use `parameters`" if engine == "fsdp" else ""
        yield ("parallel.offload", "parallel.engine"), f"is optimizer, which needs parallel.engine deepspeed{other}"
    if parallel.offload == "parameters" and engine == "ddp":
        yield ("parallel.offload", "parallel.engine"), "is parameters, which needs parallel.engine fsdp or deepspeed"
    if engine == "deepspeed" and parallel.offload == "parameters" and parallel.zero_stage != 3:
        yield (
            ("parallel.offload", "parallel.zero_stage"),
            f"is parameters, which needs parallel.zero_stage 3, not {parallel.zero_stage}",
        )
    if engine == "deepspeed" and parallel.offload == "optimizer" and parallel.zero_stage == 0:
        yield ("parallel.offload", "parallel.zero_stage"), "is optimizer, which needs parallel.zero_stage 1, 2 or 3"
    if parallel.replicate > 1 and engine in ("ddp", "deepspeed"):
        yield ("parallel.replicate", "parallel.engine"), f"is {parallel.replicate}, which needs parallel.engine fsdp"
    ranks = config.launch.num_nodes * (config.launch.nproc_per_node or 0)
    if ranks % parallel.replicate:
        yield (
            ("parallel.replicate", "launch.nproc_per_node"),
            f"is {parallel.replicate}, which does not divide the {ranks} ranks",
        )
    if parallel.reduce_dtype == "bf16" and engine == "ddp":
        yield ("parallel.reduce_dtype", "parallel.engine"), "is bf16, which needs parallel.engine fsdp or deepspeed"
    if parallel.deepspeed_config is not None and engine != "deepspeed":
        yield ("parallel.deepspeed_config", "parallel.engine"), "needs parallel.engine deepspeed"


# --- settings without effect -----------------------------------------------------------------------------------------

_ENGINE_OF = {"zero_stage": "deepspeed", "bucket_size": "deepspeed", "reshard_after_forward": "fsdp"}


def unused_settings(config: RunConfig) -> Iterator[str]:
    """Yield a sentence for each setting that was changed and has no effect; `parallel.engine` must be resolved."""
    parallel, default = config.parallel, ParallelConfig()
    changed = {name for name in ParallelConfig.model_fields if getattr(parallel, name) != getattr(default, name)}
    for name, engine in _ENGINE_OF.items():
        if name in changed and parallel.engine != engine:
            yield f"parallel.{name} has no effect with engine {parallel.engine}."
    if "bucket_size" in changed and parallel.engine == "deepspeed" and parallel.zero_stage == 0:
        yield "parallel.bucket_size has no effect with parallel.zero_stage 0."
    collator = config.datacollator
    if collator.mask_all and (collator.mask_replace_prob, collator.random_replace_prob) != (0.8, 0.1):
        yield "datacollator.mask_replace_prob and random_replace_prob have no effect with datacollator.mask_all."
    if config.optimizer.name == "adam" and config.optimizer.decay_embeddings:
        yield "optimizer.decay_embeddings has no effect with adam, whose decay is of all parameters."
    for name in ("activation_checkpointing", "activation_checkpointing_every"):
        if name in changed and not config.trainer.gradient_checkpointing:
            yield f"parallel.{name} has no effect without trainer.gradient_checkpointing."
