"""Learning rate as a pure function of the step: nothing to save, nothing to restore.

Update number `step` (counted from 0) uses ``lr * multiplier(step)``: linear warmup from 1e-4 to 1 over `warmup`, then
the named shape down to `final_lr_ratio` at `decay_end`, then constant. These are NeoBERT's learning rates, update for
update. `polynomial_decay` counts updates from 1 instead, as fairseq and annotated-mpnet do: the warmup's update n has
n / warmup, and the last update has the end value.
"""

import math
from collections.abc import Callable
from functools import partial

from enc.encoder.optim.config import SchedulerConfig

_WARMUP_START = 1e-4
_DEFAULT_STABLE_DECAY_PERCENT = 10.0


def make_schedule(config: SchedulerConfig, max_steps: int) -> Callable[[int], float]:
    """Return ``step -> multiplier`` of the peak learning rate."""
    warmup, decay_start, decay_end = phases(config, max_steps)
    if config.name == "polynomial_decay":
        return partial(_polynomial_decay, warmup, decay_end, config.final_lr_ratio, config.power)
    shape = _SHAPES[config.name]

    def multiplier(step: int) -> float:
        if step < warmup:
            return _WARMUP_START + (1 - _WARMUP_START) * step / warmup
        progress = min(max((step - decay_start) / (decay_end - decay_start), 0.0), 1.0)
        return shape(progress, config.final_lr_ratio, config.power)

    return multiplier


def phases(config: SchedulerConfig, max_steps: int) -> tuple[int, int, int]:
    """Return (steps of warmup, first step of the decay, step at which the decay has ended)."""
    total = config.total_steps or max_steps
    warmup = config.warmup_steps if config.warmup_percent is None else round(total * config.warmup_percent / 100)
    if config.name == "warmup_stable_decay":
        percent = config.decay_percent
        if percent is None and config.decay_steps is None:
            percent = _DEFAULT_STABLE_DECAY_PERCENT
        length = config.decay_steps if percent is None else round(total * percent / 100)
        return warmup, max(warmup, total - max(length or 1, 1)), max(warmup + 1, total)
    end = config.decay_steps or total
    if config.decay_percent is not None:
        end = round(total * config.decay_percent / 100)
    return warmup, warmup, max(warmup + 1, end)


def _polynomial_decay(warmup: int, decay_end: int, final: float, power: float, step: int) -> float:
    update = step + 1
    if update <= warmup:
        return update / warmup
    start = warmup or 1  # without a warmup the first update has the peak
    return _polynomial(min((update - start) / max(decay_end - start, 1), 1.0), final, power)


def _cosine(progress: float, final: float, _power: float) -> float:
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def _polynomial(progress: float, final: float, power: float) -> float:
    falling: float = (1 - progress) ** power
    return final + (1 - final) * falling


def _linear(progress: float, final: float, _power: float) -> float:
    return final + (1 - final) * (1 - progress)


def _constant(_progress: float, _final: float, _power: float) -> float:
    return 1.0


_SHAPES = {
    "cosine": _cosine,
    "linear": _linear,
    "warmup_stable_decay": _linear,
    "polynomial": _polynomial,
    "constant": _constant,
}
