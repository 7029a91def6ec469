"""What trains a model, as the loop sees it: batches of each step, what they count, and where their source stands."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import torch

from enc.encoder.sizing.batch_split import BatchSplit

Cursor = list[list[int]]
"""Where a source stands that cannot be entered at any place: integers of each of its lanes."""

ShouldStop = Callable[[], bool]


def never() -> bool:
    """Answer whoever asks whether to stop."""
    return False


class StepSizes(NamedTuple):
    """What a microbatch, or the global batch of a step, holds; each adds up over microbatches and ranks."""

    size: int  # what the sum of losses is divided by, e.g. labels
    tokens: int  # of the text
    positions: int  # that go through the model
    keys: int  # that attention reads
    pairs: int  # positions times keys, summed over documents


def total(sizes: list[StepSizes]) -> StepSizes:
    """Add up the sizes of several microbatches, or of none."""
    return StepSizes(*map(sum, zip(StepSizes(0, 0, 0, 0, 0), *sizes, strict=True)))


class Batch(Protocol):
    """One microbatch of one rank."""

    @property
    def sizes(self) -> StepSizes:
        """What it holds, counted on the CPU."""

    def to(self, device: torch.device) -> Self:
        """Return the batch on a device."""


class Share(NamedTuple):
    """Which part of each global batch a rank takes."""

    split: BatchSplit
    rank: int
    pin_memory: bool = False


class TrainData(Protocol):
    """What a run trains on.

    The global batch of step s is a function of (config, s), whoever asks, wherever it starts. Random access is not
    asked for: a source that is read in order says by its cursor where it stood.
    """

    @property
    def fingerprint(self) -> str:
        """A hash of the data, which a checkpoint keeps and a resumed run compares."""

    @property
    def tokenizer_dir(self) -> Path:
        """Folder of the tokenizer that made the ids."""

    @property
    def attachments(self) -> list[Path]:
        """Files and folders that each checkpoint gets a copy of."""

    def steps(
        self, share: Share, first_step: int, cursor: Cursor | None = None, should_stop: ShouldStop = never
    ) -> Iterator[list[Any]]:
        """Return the microbatches of each step from `first_step` (counted from 0) to the end of the run.

        A list without any says that the run should stop while it waited for some: no wait may be deaf to signals.
        `cursor` is what `cursor(first_step)` gave to the run that is resumed. Processes that prepare batches have
        started when this returns.
        """

    def first_batch(self, share: Share) -> Any:
        """Return a microbatch like those to come, for the engine to warm up with; starts no process."""

    def cursor(self, step: int) -> Cursor | None:
        """Return what `steps` needs to go on at a step; None where the number of the step is enough."""

    def places_per_step(self, share: Share) -> int:
        """Return how many tokens would fill a step."""

    def describe(self, share: Share) -> str:
        """Say how much there is, and how often a run reads it."""
