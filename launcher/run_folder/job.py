"""What a scheduler says of a job, for whoever does not know the scheduler."""

from dataclasses import dataclass
from typing import Literal

Phase = Literal["waiting", "running", "ending", "over"]


@dataclass(frozen=True)
class Job:
    """A job of a run; texts are the scheduler's own words."""

    scheduler: str  # what people call it
    id: str
    phase: Phase
    state: str
    was_cancelled: bool = False
    reason: str = ""
    elapsed: str = ""
    time_limit: str = ""

    @property
    def is_over(self) -> bool:
        """Whether the job will not run any more."""
        return self.phase == "over"

    @property
    def waits(self) -> bool:
        """Whether the job is in the queue."""
        return self.phase == "waiting"
