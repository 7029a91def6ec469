"""When a run has to stop so that its last save is on disk before the job's time is over. Pure."""

from dataclasses import dataclass

_SPARE_S = 15.0  # leaving, flushing, the scheduler's own rounding
_GUESSED_STEP_S = 5.0
_GUESSED_BYTES_PER_S = 200e6


@dataclass(frozen=True)
class Times:
    """What the ranks measured; None before there was one."""

    step_s: float | None
    save_s: float | None


def reserve_s(times: Times, checkpoint_bytes: int) -> float:
    """Return the seconds that stopping may take: a step under way, a save that just began, another save."""
    step = _GUESSED_STEP_S if times.step_s is None else times.step_s
    save = checkpoint_bytes / _GUESSED_BYTES_PER_S if times.save_s is None else times.save_s
    return 2 * step + 2 * save + _SPARE_S
