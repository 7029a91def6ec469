"""A rank that stays far behind the others is named once in a while; noise is not."""

from types import SimpleNamespace
from typing import Any

from enc.encoder.run.stragglers import Stragglers


def watched(lines: list[list[float]], steps: int = 50) -> list[tuple[int, dict[str, Any]]]:
    """Return (line, who is named) of log lines, each with the ranks' own seconds a step."""
    stragglers, named = Stragglers(), []
    for number, times in enumerate(lines, start=1):
        ranks: Any = SimpleNamespace(
            world_size=len(times), gather=lambda _own, times=times: [(t, f"n{i}") for i, t in enumerate(times)]
        )
        if found := stragglers.find(ranks, times[0], steps):
            named.append((number, found))
    return named


def test_a_rank_that_stays_behind_is_named() -> None:
    """With its machine, and how far behind."""
    assert watched([[0.1, 0.1, 0.3, 0.1]] * 4) == [(4, {"rank": 2, "host": "n2", "ratio": 3.0})]


def test_noise_is_not_named() -> None:
    """Another rank each time, a small difference, or steps of milliseconds."""
    assert watched([[0.1, 0.3, 0.1], [0.3, 0.1, 0.1]] * 10) == []
    assert watched([[0.1, 0.14, 0.1]] * 20) == []
    assert watched([[0.001, 0.009, 0.001]] * 20) == []
    assert watched([[0.1, 0.3, 0.1]] * 10, steps=1) == []
