"""Names of keys that other trainers, or older versions, use."""

from typing import Any

from enc.encoder.config import not_built
from enc.encoder.config.schema import RunConfig
from enc.encoder.config.yaml_source import COMMAND_LINE, Problem, Source, get_key, remove_key, set_key

RENAMED = {
    "mixed_precision": "trainer.mixed_precision",
    "trainer.bf16": "trainer.mixed_precision",
    "trainer.seed": "seed",
    "trainer.run_name": "wandb.name",
    "trainer.learning_rate": "optimizer.lr",
    "trainer.warmup_steps": "scheduler.warmup_steps",
    "trainer.max_grad_norm": "trainer.gradient_clipping",
    "trainer.dir": "trainer.output_dir",
    "trainer.train_batch_size": "trainer.per_device_train_batch_size",
    "trainer.eval_batch_size": "trainer.per_device_eval_batch_size",
    "trainer.max_ckpt": "trainer.save_total_limit",
    "dataset.tokenizer_name": "tokenizer.name",
    "dataset.column": "dataset.text_column",
    "dataset.path_to_disk": "dataset.path",
    "tokenizer.tokenizer_name_or_path": "tokenizer.name",
    "wandb.log_interval": "trainer.logging_steps",
    "model.name_or_path": "model.name",
    **{f"optimizer.hparams.{key}": f"optimizer.{key}" for key in ("lr", "weight_decay", "betas", "eps")},
}
_DROPPED = {
    "trainer.remove_unused_columns": "no columns are passed on",
    "trainer.report_to": "TensorBoard is always on, W&B by wandb.enabled",
    "scheduler.num_cycles": "the schedules have one cycle",
}
_ATTENTION_SWITCHES = ("model.flash_attention", "model.use_flash_attention", "model.xformers_attention")
# The old default of these says nothing: NeoBERT writes them into every saved config.
_SILENT: dict[str, Any] = {
    "trainer.max_ckpt": None,
    "trainer.train_batch_size": None,
    "trainer.eval_batch_size": None,
    "trainer.report_to": [],
    "wandb.log_interval": 100,
}


def top_level_names() -> set[str]:
    """Return the names that a config may have without a section: keys, sections and old names."""
    old_names = {old for old in RENAMED if "." not in old}
    return {*RunConfig.model_fields, "variables", *old_names, *not_built.top_level_names()}


def apply_old_names(source: Source) -> None:
    """Move values under old names to their present keys, with a warning each; two different values are a problem."""
    for old, why in _DROPPED.items():
        if get_key(source.tree, old)[0]:
            value = remove_key(source.tree, old)
            if not _is_silent(old, value):
                source.warnings.append(f"{old} is ignored: {why}.")
    for old in _ATTENTION_SWITCHES:
        if get_key(source.tree, old)[0]:
            on = remove_key(source.tree, old)
            _rename(source, old, "model.attn_backend", "flash_attn_varlen" if on else "sdpa")
    for old, new in RENAMED.items():
        if get_key(source.tree, old)[0]:
            value = remove_key(source.tree, old)
            if not _is_silent(old, value):
                _rename(source, old, new, value)
    if get_key(source.tree, "optimizer.hparams") == (True, {}):
        remove_key(source.tree, "optimizer.hparams")


def _is_silent(old: str, value: Any) -> bool:
    return old in _SILENT and value == _SILENT[old]


def _rename(source: Source, old: str, new: str, value: Any) -> None:
    given, present = get_key(source.tree, new)
    place = source.place(old)
    overrides = place == COMMAND_LINE != source.place(new)
    if given and present != value and not overrides:
        text = f"is {value!r}, but it is an old name of {new}, which is {present!r}; keep one of them"
        source.problems.append(Problem(old, text, place))
        return
    source.warnings.append(f"{old} is an old name: use {new}.")
    set_key(source.tree, new, value)
    source.places[new] = place
