"""The run configuration: one frozen class a section; a field's docstring is its help text and its page in the docs.

Section and key names are NeoBERT's where it has them, so its YAML loads; those of features that are not built yet stand
in `not_built`. A field marked `NoEffect` is accepted for compatibility: another value than its default draws a warning
that says why nothing depends on it. A field marked `KeepsNumbers` may change when a run goes on.

Reading YAML, overrides and all error reporting: `load`. Rules that span fields: `checks`.
"""

from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

import yaml
from pydantic import Discriminator, Tag

from enc.encoder.config.launch import LaunchConfig
from enc.encoder.data.config import DataCollatorConfig, DatasetConfig, TokenizerConfig
from enc.encoder.engine.config import ParallelConfig
from enc.encoder.models.architecture import Parameter
from enc.encoder.models.config import ModelConfig
from enc.encoder.models.neobert.config import NeoBertConfig
from enc.encoder.models.registry import ARCHITECTURES, architecture_of
from enc.encoder.optim.config import OptimizerConfig, SchedulerConfig
from enc.encoder.run.config import TrainerConfig, WandbConfig
from enc.encoder.section import Bool, Count, KeepsNumbers, NoEffect, Section
from enc.encoder.tasks import TASKS, TaskName


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

    task: TaskName = "pretraining"
    """What to run."""
    seed: Count = 0
    """Seed of every random draw."""
    debug: Annotated[Bool, NoEffect("use `enc --debug`"), KeepsNumbers()] = False
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
    wandb: Annotated[WandbConfig, KeepsNumbers()] = WandbConfig()
    parallel: Annotated[ParallelConfig, KeepsNumbers()] = ParallelConfig()
    launch: Annotated[LaunchConfig, KeepsNumbers()] = LaunchConfig()
    use_deepspeed: Annotated[Bool, NoEffect("checkpoints are told apart by their files")] = False
    """The checkpoint to load was written by DeepSpeed."""
    accelerate_config_file: Annotated[str | None, NoEffect("`enc` starts its own processes")] = None
    """Accelerate's settings file."""
    config_path: Annotated[str | None, NoEffect("the file is named on the command line")] = None
    """File that the config was read from."""
    pretraining_metadata: Annotated[dict[str, Any], NoEffect("it is a note only")] = {}
    """Notes."""

    @property
    def parameters(self) -> dict[str, Parameter]:
        """Every parameter that the run trains, by name: those of the model, and those that the task adds to it."""
        return architecture_of(self.model).parameters(self.model) | TASKS[self.task].parameters(self)

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


def differences(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Return ``{dotted key: (old, new)}`` of the values that differ."""
    before, after = flatten(old.model_dump(mode="json")), flatten(new.model_dump(mode="json"))
    keys = dict.fromkeys([*before, *after])
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}
