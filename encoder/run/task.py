"""What a run is for, behind one interface that the loop goes by, chosen once by `task` of the config."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, NamedTuple, Protocol

from torch import nn

from enc.encoder.config.schema import RunConfig
from enc.encoder.data.interface import Share, StepSizes, TrainData
from enc.encoder.evaluate.interface import Evaluation
from enc.encoder.hardware import Hardware
from enc.encoder.objectives.interface import Objective
from enc.encoder.ranks import Ranks
from enc.encoder.tasks import TASKS, TaskRecord

Lines = list[tuple[str, str]]


class TrainMetrics(NamedTuple):
    """What a training record says of the sums since the last one."""

    always: dict[str, float]  # `loss` among it; near the front of the record
    asked: dict[str, float]  # what the config asks for beside it; near the end


class Task(Protocol):
    """Data, model, objective and evaluation of a run. Made of (config, ranks, hardware)."""

    record: TaskRecord
    share: Share
    """This rank's part of each global batch."""
    data: TrainData
    model: Any
    """What is trained, under its parameters' own names, a `MaskedLanguageModel`."""
    objective: Objective
    """A module around the model, which engines wrap."""
    evaluations: Mapping[str, Evaluation]
    """`eval` while training and `test` after the last step, as far as the run has them."""

    def load_first_weights(self) -> None:
        """Fill the model with the weights that the config starts from, if it names any."""

    def evaluation(self, split: str, max_batches: int | None = None) -> Evaluation:
        """Return the evaluation of any split, as the run would do it. Raises UsageError when there is none."""

    def train_metrics(self, window: dict[str, float]) -> TrainMetrics:
        """Return what a training record says of the sums in `window`, which may be of nothing."""

    def flops(self, sizes: StepSizes) -> int:
        """Return the operations of a step, forward and backward."""

    def describe(self, first_step: int) -> Lines:
        """Say what is learnt and from what, as (name, choice)."""

    def describe_computation(self, hardware: Hardware) -> Lines:
        """Say which fast paths are on, and what is computed beyond what is needed."""


def make_task(config: RunConfig, ranks: Ranks, hardware: Hardware) -> Task:
    """Open the data and build the model of a run. Raises UsageError when they do not fit together."""
    module, _, name = TASKS[config.task].code.partition(":")
    task: Task = getattr(import_module(module), name)(config, ranks, hardware)
    return task


def module_of(task: Task) -> nn.Module:
    """Return a task's objective as the module that it is."""
    assert isinstance(task.objective, nn.Module)
    return task.objective
