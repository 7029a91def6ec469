"""What a run tells about its steps, and the work that it counts for that."""

from dataclasses import dataclass, field

from enc.encoder.data.interface import StepSizes
from enc.encoder.heartbeat import Heartbeat
from enc.encoder.run.log import RunLog
from enc.encoder.run.stragglers import Stragglers


@dataclass
class StepWork:
    """Work and time since the last log line, for rates; never saved."""

    steps: int = 0
    tokens: int = 0
    flops: int = 0
    seconds: float = 0.0
    save_stall_s: float = 0.0

    def add(self, sizes: StepSizes, flops: int) -> None:
        """Add a step, whose seconds come later."""
        self.steps += 1
        self.tokens += sizes.tokens
        self.flops += flops


@dataclass
class Reporter:
    """What others learn of a run: log, heartbeat, and what is measured between two log lines."""

    log: RunLog
    heartbeat: Heartbeat
    work: StepWork = field(default_factory=StepWork)
    stragglers: Stragglers = field(default_factory=Stragglers)

    def step_done(self, step: int, seconds: float) -> None:
        """Take note that a step took so long, its counting included."""
        self.work.seconds += seconds
        self.heartbeat.step, self.heartbeat.step_s = step, self.work.seconds / self.work.steps
        self.log.advance(step)
