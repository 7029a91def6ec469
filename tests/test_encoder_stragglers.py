"""A rank that stays far behind the others is named once in a while; noise is not."""

from types import SimpleNamespace
from typing import Any

from enc.encoder.run.train import StepWork, Stragglers


class Log:
    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def event(self, name: str, **details: Any) -> None:
        self.events.append({"event": name, **details})


def watched(lines: list[list[float]], steps: int = 50) -> list[dict[str, Any]]:
    """Return the events of log lines, each with the ranks' own seconds a step."""
    log, stragglers = Log(), Stragglers()
    for number, times in enumerate(lines, start=1):
        ranks = SimpleNamespace(
            world_size=len(times), gather=lambda _own, times=times: [(t, f"n{i}") for i, t in enumerate(times)]
        )
        state = SimpleNamespace(step=number * steps)
        run: Any = SimpleNamespace(ranks=ranks, log=log, state=state, work=StepWork(steps=steps))
        stragglers.note(run, times[0])
    return log.events


def test_a_rank_that_stays_behind_is_named() -> None:
    """With its machine, and how far behind."""
    assert watched([[0.1, 0.1, 0.3, 0.1]] * 4) == [
        {"event": "straggler", "step": 200, "rank": 2, "host": "n2", "ratio": 3.0}
    ]


def test_noise_is_not_named() -> None:
    """Another rank each time, a small difference, or steps of milliseconds."""
    assert watched([[0.1, 0.3, 0.1], [0.3, 0.1, 0.1]] * 10) == []
    assert watched([[0.1, 0.14, 0.1]] * 20) == []
    assert watched([[0.001, 0.009, 0.001]] * 20) == []
    assert watched([[0.1, 0.3, 0.1]] * 10, steps=1) == []
