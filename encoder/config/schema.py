"""The run configuration: one frozen class a section; a field's docstring is its help text and its page in the docs.

Section and key names are NeoBERT's where it has them, so its YAML loads. A field marked `NotBuilt` is known but has no
code behind it yet: any value but its default is refused with the sentence given. A field marked `NoEffect` is accepted
for compatibility: another value than its default draws a warning that says why nothing depends on it.

Reading YAML, overrides and all error reporting: `enc.encoder.config.load`. Rules that span fields: `config_checks`.
"""

from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

import yaml
from pydantic import Discriminator, Tag

from enc.encoder.config.launch import LaunchConfig
from enc.encoder.config.tasks import ContrastiveConfig, GlueConfig, MtebConfig
from enc.encoder.data.config import DataCollatorConfig, DatasetConfig, TokenizerConfig
from enc.encoder.engine.config import ParallelConfig
from enc.encoder.models.config import ModelConfig
from enc.encoder.models.neobert.config import NeoBertConfig
from enc.encoder.models.registry import ARCHITECTURES, architecture_of
from enc.encoder.optim.config import OptimizerConfig, SchedulerConfig
from enc.encoder.run.config import TrainerConfig, WandbConfig
from enc.encoder.section import Bool, Count, NoEffect, NotBuilt, Section


def _model_type(value: Any) -> str:
    name = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return name if name in ARCHITECTURES else next(iter(ARCHITECTURES))


if TYPE_CHECKING:
    AnyModelConfig = ModelConfig
else:
    AnyModelConfig = Annotated[
        Union[tuple(Annotated[known.config, Tag(name)] for name, known in ARCHITECTURES.items())],  # noqa: UP007
        Discriminator(_model_type),
    ]


class RunConfig(Section):
    """All that a run depends on."""

    task: Literal["pretraining", "glue", "mteb", "contrastive"] = "pretraining"
    """What to run."""
    seed: Count = 0
    """Seed of every random draw."""
    debug: Annotated[Bool, NoEffect("use `enc --debug`")] = False
    """Show more of what happens."""
    objective: Literal["auto", "mlm", "mpnet", "plm"] = "auto"
    """What is learnt: `mlm` masked tokens; `mpnet` masked and permuted tokens, `plm` permuted ones, both with an MPNet
    only. `auto` is `mpnet` for an MPNet, else `mlm`."""
    model: AnyModelConfig = NeoBertConfig()
    dataset: DatasetConfig = DatasetConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    datacollator: DataCollatorConfig = DataCollatorConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    trainer: TrainerConfig = TrainerConfig()
    contrastive: ContrastiveConfig = ContrastiveConfig()
    glue: GlueConfig = GlueConfig()
    mteb: MtebConfig = MtebConfig()
    wandb: WandbConfig = WandbConfig()
    parallel: ParallelConfig = ParallelConfig()
    launch: LaunchConfig = LaunchConfig()
    pretrained_checkpoint: Annotated[str | int, NotBuilt("starting from another run's weights")] = "latest"
    """Checkpoint that evaluation or fine-tuning starts from."""
    use_deepspeed: Annotated[Bool, NoEffect("checkpoints are told apart by their files")] = False
    """The checkpoint to load was written by DeepSpeed."""
    accelerate_config_file: Annotated[str | None, NoEffect("`enc` starts its own processes")] = None
    """Accelerate's settings file."""
    config_path: Annotated[str | None, NoEffect("the file is named on the command line")] = None
    """File that the config was read from."""
    pretraining_metadata: Annotated[dict[str, Any], NoEffect("it is a note only")] = {}
    """Notes."""

    @property
    def trained_objective(self) -> str:
        """What is learnt: `objective`, with `auto` resolved."""
        return architecture_of(self.model).objectives[0] if self.objective == "auto" else self.objective

    @property
    def row_length(self) -> int:
        """Tokens a row holds, special tokens included."""
        packed = self.datacollator.max_length if self.datacollator.pack_sequences else None
        return packed or self.dataset.max_seq_length

    def changed(self, updates: dict[str, Any]) -> "RunConfig":
        """Return a copy with dotted keys set, e.g. ``{"trainer.global_batch_size": 64}``; values are trusted."""
        result = self
        for key, value in updates.items():
            result = _with(result, key.split("."), value)
        return result

    def to_yaml(self) -> str:
        """Return the whole config as YAML that loads back to an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _with(section: Any, path: list[str], value: Any) -> Any:
    first, *rest = path
    return section.model_copy(update={first: _with(getattr(section, first), rest, value) if rest else value})


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested mapping as ``{dotted key: value}``."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


# Keys that decide where a run happens and what it shows, but not which numbers it computes.
_FREE_SECTIONS = ("launch", "parallel", "wandb", "debug")
_FREE_KEYS = {
    "dataset": "path pre_tokenize_output num_proc num_workers pin_memory persistent_workers prefetch_factor cache_dir",
    "trainer": """output_dir use_cpu overwrite_output_dir resume_from_checkpoint disable_tqdm max_nonfinite_steps
        per_device_train_batch_size gradient_accumulation_steps per_device_eval_batch_size
        logging_steps log_train_accuracy log_weight_norms eval_strategy eval_steps eval_on_start eval_max_batches
        save_strategy save_steps save_total_limit min_free_disk_gb metric_for_best_model greater_is_better
        tensorboard_dir""",
}


def keeps_numbers(key: str) -> bool:
    """Tell whether a change of this dotted key leaves data, masks and maths of the run the same."""
    section, _, name = key.partition(".")
    return section in _FREE_SECTIONS or name in _FREE_KEYS.get(section, "").split()


def differences(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Return ``{dotted key: (old, new)}`` of the values that differ."""
    before, after = flatten(old.model_dump(mode="json")), flatten(new.model_dump(mode="json"))
    keys = dict.fromkeys([*before, *after])
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}
