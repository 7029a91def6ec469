"""The parts of a run that its functions share."""

from dataclasses import dataclass
from pathlib import Path

from enc.encoder.checkpoints.io import Saver
from enc.encoder.config.schema import RunConfig
from enc.encoder.engine.interface import Engine
from enc.encoder.hardware import Hardware
from enc.encoder.ranks import Ranks
from enc.encoder.run.reporter import Reporter
from enc.encoder.run.state import TrainState
from enc.encoder.run.task import Task
from enc.encoder.signals import StopFlag


@dataclass(frozen=True)
class Place:
    """Where this process stands: among its peers, on which device, and whether it was told to stop."""

    ranks: Ranks
    hardware: Hardware
    stop: StopFlag


@dataclass
class Run:
    """One rank's run."""

    dir: Path
    config: RunConfig
    place: Place
    task: Task
    engine: Engine
    saver: Saver
    reporter: Reporter
    state: TrainState
    saved_step: int = -1
    """The last step of which this run has a checkpoint, or writes one."""
