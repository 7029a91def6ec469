"""The counters of a run and how a checkpoint keeps them (no torch)."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Best:
    """The best evaluation so far, whose checkpoint is kept."""

    metric: str
    value: float
    step: int


@dataclass
class TrainState:
    """Counters of a run, the same on all ranks. Everything else is a function of the config and `step`."""

    step: int = 0
    tokens: int = 0
    nonfinite_steps: int = 0
    evaluated_step: int = -1
    loss_is_finite: bool = True
    window: dict[str, float] = field(default_factory=dict)
    """The task's sums since the last log line, so that a resumed run logs the same averages."""
    best: Best | None = None
    cursor: list[list[int]] | None = None
    """Where the data stood after `step`, as `TrainData.cursor` says."""


def trainer_state(state: TrainState, data_fingerprint: str | None, world_size: int) -> dict[str, Any]:
    """Return what `trainer_state.json` holds, all but the engine's own `optimizer_steps`."""
    counters = asdict(state)
    if state.cursor is None:
        del counters["cursor"]
    return counters | {"data_fingerprint": data_fingerprint, "world_size": world_size}


def read_state(saved: dict[str, Any], empty_window: dict[str, float]) -> TrainState:
    """Return the counters of a `trainer_state.json`; one that an older checkpoint lacks begins as in a new run."""
    counters = {name: saved[name] for name in TrainState.__dataclass_fields__ if name in saved}
    best = Best(**counters["best"]) if counters.get("best") else None
    window = {name: counters.get("window", {}).get(name, zero) for name, zero in empty_window.items()}
    return TrainState(**counters | {"window": window, "best": best})
