"""What is known of a task without building it: what it measures, and where its code is. One record a task; no torch.

The loop, the config, the console, the report and `enc status` go by these records. A metric stands in `metrics.jsonl`
under its own name where training logs it, as `eval_<name>` of an evaluation and as `test_<name>` of the test.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

Rule = tuple[tuple[str, ...], str]
"""A broken rule: the keys that it spans, and what is wrong and what to do."""


def fit(number: float | None, width: int) -> str:
    """Return a number in `width` characters, with the decimals that there is room for; None is not a number."""
    number = math.nan if number is None else number
    texts = (f"{number:{width}.{decimals}f}" for decimals in range(width - 2, -1, -1))
    return next((text for text in texts if len(text) <= width), f"{number:.0e}")


def nats(number: float | None) -> str:
    """Return a loss in nats and in bits."""
    bits = None if number is None else number / math.log(2)
    return f"{fit(number, 6)} nats ({fit(bits, 6)} bits)"


def percent(number: float | None) -> str:
    """Return a share."""
    return f"{math.nan if number is None else number:.2%}"


def plain(number: float | None) -> str:
    """Return a number in at most five characters."""
    return fit(number, 5).strip()


@dataclass(frozen=True)
class Metric:
    """One number that a task is judged by."""

    name: str
    console: Callable[[float | None], str] = plain
    """How a line on the console shows it."""
    digits: str = ".4f"
    """How the report's summary shows it, as a format."""
    greater_is_better: bool = False
    chart: str | None = None
    """Title of its chart in the report; none without."""
    unit: str = ""
    """What stands under that title."""


@dataclass(frozen=True)
class TaskRecord:
    """What a task measures, and what implements it."""

    title: str
    """What it is, in a sentence of a message."""
    command: str
    """The command that starts it: `enc launch <command>`."""
    help: str
    """What that command does, in a sentence."""
    code: str
    """Module and class that implement `enc.encoder.run.task.Task`: `module:Class`; imported when a run is built."""
    loss: Metric
    """What training minimises: each training record and each evaluation has it. Its name is `loss` in every task."""
    metrics: tuple[Metric, ...]
    """What an evaluation gives beside it."""
    size: str
    """What a sum of losses is divided by. Like that of every count, its name begins with `num_`."""
    sums: tuple[str, ...]
    """What is summed between two log lines, `loss_sum` and the size among it; checkpoints keep it in this order."""
    exports: bool = False
    """Whether a checkpoint can become a folder for transformers."""
    parameters: Callable[[Any], dict[str, Any]] = lambda _config: {}
    """What it trains beside the model's own parameters, of a run config: a `models.architecture.Parameter` by name."""
    rules: Callable[[Any], Iterable[Rule]] = lambda _config: ()
    """Rules that its runs keep to, of a run config."""

    @property
    def eval_metrics(self) -> dict[str, Metric]:
        """The metrics that may choose the best checkpoint, under the names that an evaluation gives them."""
        return {f"eval_{metric.name}": metric for metric in (self.loss, *self.metrics)}

    def empty_sums(self) -> dict[str, float]:
        """Return sums over nothing; counts are integers."""
        return {name: 0 if name.startswith("num_") else 0.0 for name in self.sums}


TASKS = {
    "pretraining": TaskRecord(
        title="pretraining",
        command="pretrain",
        help="Pretrain an encoder.",
        code="enc.encoder.run.pretraining:Pretraining",
        loss=Metric("loss", nats, chart="Loss", unit="nats per label"),
        metrics=(
            Metric("accuracy", percent, ".2%", greater_is_better=True, chart="Accuracy of masked tokens"),
            Metric("perplexity", digits=".1f"),
        ),
        size="num_labels",
        sums=("loss_sum", "num_labels", "num_correct", "logsumexp_sum"),
        exports=True,
    ),
}

if TYPE_CHECKING:
    TaskName: TypeAlias = str
    EvalMetric: TypeAlias = str
else:  # what a config may say
    TaskName = Literal[tuple(TASKS)]
    EvalMetric = Literal[tuple(dict.fromkeys(name for task in TASKS.values() for name in task.eval_metrics))]
