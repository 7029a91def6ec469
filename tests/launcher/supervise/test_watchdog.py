"""Progress is what ranks say of their main threads; the time to stop follows from what was measured."""

from typing import Any

import pytest

from enc.launcher.backends.slurm.host import expand
from enc.launcher.supervise.deadline import Times, reserve_s
from enc.launcher.supervise.watchdog import Watchdog, hang_text


def rank(marks: int, time: float, phase: str = "backward", host: str = "n1") -> dict[str, Any]:
    return {"marks": marks, "time": time, "phase": phase, "step": 7, "host": host}


def test_any_ranks_progress_counts() -> None:
    """One rank that moves is enough; files that are only rewritten are not."""
    dog = Watchdog(timeout_s=10)
    assert not dog.is_stuck({0: rank(1, 0.0), 1: rank(1, 0.0)}, now=0)
    assert not dog.is_stuck({0: rank(1, 5.0), 1: rank(2, 5.0)}, now=9)
    assert not dog.is_stuck({0: rank(1, 15.0), 1: rank(2, 15.0)}, now=18)
    assert dog.is_stuck({0: rank(1, 20.0), 1: rank(2, 20.0)}, now=19.5)


def test_a_start_without_any_word_is_a_hang_too() -> None:
    """Nothing at all for the whole time."""
    dog = Watchdog(timeout_s=10)
    assert not dog.is_stuck({}, now=100)
    assert dog.is_stuck({}, now=111)
    assert dog.evidence({}, 2, now=111)[0]["phase"] == "not started"


def test_the_rank_that_is_silent_is_named_first() -> None:
    """Clocks of other machines do not count, only whether their files change."""
    dog = Watchdog(timeout_s=10)
    for now in range(0, 13):
        files = {0: rank(5, 1e9 + now), 1: rank(5, 3.0, "forward", "n2"), 2: rank(4, 7.0 + now)}
        over = dog.is_stuck(files, now=now)
    assert over
    ranks = dog.evidence(files, 3, now=12)
    assert [r["rank"] for r in ranks] == [1, 2, 0]
    assert ranks[0]["silent_s"] == 12
    assert hang_text(ranks, 10) == (
        "No rank made progress for 10 s: rank 1 on n2 is in forward at step 7, silent for 12 s; "
        "the others are in backward."
    )


def test_without_silence_the_rank_that_the_others_wait_for_is_first() -> None:
    """The one with the fewest changes of phase."""
    dog = Watchdog(timeout_s=10)
    for now in range(0, 13):
        files = {0: rank(9, float(now)), 1: rank(8, float(now), "data_wait")}
        dog.is_stuck(files, now=now)
    assert dog.evidence(files, 2, now=12)[0]["rank"] == 1


def test_time_to_stop() -> None:
    """Room for a step under way, a save that just began and the last save; guesses until there are measurements."""
    assert reserve_s(Times(step_s=3.0, save_s=40.0), 0) == 2 * 3 + 2 * 40 + 15
    assert reserve_s(Times(None, None), 20_000_000_000) == 2 * 5 + 2 * 100 + 15
    assert reserve_s(Times(0.0, 0.0), 10**12) == 15


@pytest.mark.parametrize(("text", "ranks"), [("3", [3]), ("0-2", [0, 1, 2]), ("1,4-5,9", [1, 4, 5, 9])])
def test_ranks_as_srun_writes_them(text: str, ranks: list[int]) -> None:
    assert expand(text) == ranks
