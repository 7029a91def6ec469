"""Why an attempt ended and what follows: pure decisions."""

from typing import Any

import pytest

from enc.encoder.config.launch import LaunchConfig, RestartsConfig
from enc.launcher.supervise.policy import Ending, RankEnd, classify, decide, evidence

LAUNCH = LaunchConfig()


def ended(cause: str, step: int, **more: Any) -> dict[str, Any]:
    return {"event": "attempt_ended", "attempt": 1, "cause": cause, "step": step, "decision": "restart", **more}


def ranks(*ends: dict[str, Any]) -> list[RankEnd]:
    """Ranks on nodes a, b, ...; at step 9, in a backward pass, unless said otherwise."""
    usual = {"phase": "backward", "step": 9, "code": 0}
    return [RankEnd(rank, "abcd"[rank], **{**usual, **end}) for rank, end in enumerate(ends)]


GONE, PEER = {"code": None}, {"code": 3, "error": "Connection closed by peer", "lost_peer": True}
OWN = {"code": 3, "error": "ValueError: x"}


@pytest.mark.parametrize(
    ("ends", "told", "said", "cause"),
    [
        ([{}, {}], None, None, "finished"),
        ([{}, {}], "time_limit", "cancelled", "finished"),  # it was done before anything could stop it
        ([{"code": 2, "error": "bad"}, PEER], None, None, "config"),
        ([{"code": 2, "phase": "build"}, {"code": 2, "phase": "build"}], None, None, "config"),
        ([PEER, {"code": 2, "phase": "build"}], None, None, "start_failure"),  # the store is not mounted there
        ([{"code": 75}, {"code": 75}], None, None, "signal"),
        ([{"code": 75}, {"code": 75}], "time_limit", None, "time_limit"),
        ([{"code": 75}, {"code": 75}], None, "cancelled", "cancelled"),
        ([{"code": 75}, {"code": 75}], None, "preempted", "preempted"),
        ([GONE, GONE], None, "requeued", "requeued"),
        ([OWN, PEER], None, None, "crash"),
        ([PEER, OWN], None, None, "crash"),
        ([PEER, GONE], None, None, "lost_rank"),
        ([PEER, {"code": -9}], None, None, "lost_rank"),
        ([PEER, PEER], None, None, "lost_rank"),
        ([{"code": 75}, GONE], None, None, "lost_rank"),  # nobody knows whether the save was finished
        ([{"code": -9}, {"code": -9}], "hang", None, "hang"),
        ([{"phase": "start", "code": None}, {"code": None, "reported": False}], None, None, "start_failure"),
        ([{**PEER, "phase": "build"}, {**OWN, "phase": "build", "step": 0}], None, None, "start_failure"),
        ([{"phase": "start", "code": 1}, GONE], None, None, "start_failure"),  # its Python could not import torch, say
        ([{**OWN, "phase": "build"}, {**OWN, "phase": "build"}], None, None, "crash"),  # on all nodes: no node's fault
        ([{"code": None, "reported": False}, {"code": None, "reported": False}], None, None, "lost_rank"),
    ],
)  # fmt: skip
def test_classify(ends: list[dict[str, Any]], told: str | None, said: str | None, cause: str) -> None:
    """Causes from the ranks' last words, what the supervisor did and what SLURM said."""
    ending = classify(ranks(*ends), told, said)
    assert ending.cause == cause
    assert ending.detail


def test_the_rank_that_failed_by_itself_is_named() -> None:
    """Not the ones that only lost it."""
    assert classify(ranks(PEER, OWN), None, None).error == "ValueError: x"
    assert "rank 1 on b was killed by signal 9" in classify(ranks(GONE, {"code": -9}), None, None).detail.lower()
    bad = classify(ranks({"phase": "start", "code": None}, {"code": None, "reported": False}), None, None).bad_nodes
    assert bad == {"b": "rank 1 on b did not start"}


@pytest.mark.parametrize("cause", ["finished", "config", "cancelled"])
def test_never_again(cause: str) -> None:
    """Done, at fault, or cancelled: no budget brings it back."""
    assert decide(Ending(cause, 5, "x"), [], LAUNCH).action == "stop"


@pytest.mark.parametrize(("cause", "action"), [
    ("signal", "continue"), ("time_limit", "continue"), ("preempted", "continue"), ("requeued", "continue"),
    ("crash", "restart"), ("hang", "restart"), ("lost_rank", "restart"), ("start_failure", "restart"),
    ("lost_job", "restart"),
])  # fmt: skip
def test_first_time(cause: str, action: str) -> None:
    """What was stopped from outside needs another job; what failed inside starts again where it is."""
    assert decide(Ending(cause, 5, "x"), [], LAUNCH).action == action


def test_three_crashes_at_the_same_step_are_enough() -> None:
    """The reason names the step and the error; progress in between starts the count again."""
    crash = Ending("crash", 7, "x", "ValueError: bad row")
    assert decide(crash, [ended("crash", 7)], LAUNCH).action == "restart"
    last = decide(crash, [ended("crash", 7), ended("crash", 7)], LAUNCH)
    assert (last.action, last.code) == ("stop", 3)
    assert "step 7" in last.reason
    assert "ValueError: bad row" in last.reason
    assert decide(crash, [ended("crash", 4), ended("crash", 5), ended("crash", 6)], LAUNCH).action == "restart"
    assert decide(crash, [ended("crash", 4), ended("crash", 7), ended("hang", 6)], LAUNCH).action == "stop"
    lost = Ending("lost_rank", 6, "x")  # machines may fail more often between two saves than code at one step
    assert decide(lost, [ended("lost_rank", 7)] * 4, LAUNCH).action == "restart"
    assert decide(lost, [ended("lost_rank", 7)] * 5, LAUNCH).action == "stop"
    assert decide(crash, [ended("crash", 7), ended("signal", 7), ended("crash", 7)], LAUNCH).action == "stop"


def test_progress_is_a_newer_checkpoint_too() -> None:
    """Saves that fail end the run, though each attempt crashes at another step."""
    past = [ended("crash", 12, saved=-1), ended("crash", 14, saved=-1)]
    assert decide(Ending("crash", 17, "x", "disk", saved=-1), past[:1], LAUNCH).action == "restart"
    assert decide(Ending("crash", 17, "x", "disk", saved=-1), past, LAUNCH).action == "stop"
    assert decide(Ending("crash", 17, "x", "disk", saved=15), past, LAUNCH).action == "restart"


def test_a_time_limit_that_is_too_short_for_any_step_ends() -> None:
    """Jobs that never get anywhere do not follow each other for ever."""
    late = Ending("time_limit", 0, "x")
    assert decide(late, [ended("time_limit", 0), ended("time_limit", 0)], LAUNCH).action == "stop"
    moving = [ended("time_limit", 10 * i) for i in range(50)]
    assert decide(Ending("time_limit", 500, "x"), moving, LAUNCH).action == "continue"


def test_signals_and_preemptions_are_no_trouble_of_the_run() -> None:
    """However often somebody stops it."""
    assert decide(Ending("preempted", 3, "x"), [ended("preempted", 3)] * 20, LAUNCH).action == "continue"


@pytest.mark.parametrize(("budget", "causes"), [
    ("crash", ["crash"]), ("hang", ["hang"]), ("lost_rank", ["lost_rank", "lost_job", "start_failure"]),
])  # fmt: skip
def test_each_cause_has_a_budget(budget: str, causes: list[str]) -> None:
    """Also while the run makes progress."""
    launch = LaunchConfig(restarts=RestartsConfig(**{budget: 3}))
    past = [ended(causes[i % len(causes)], 10 * i) for i in range(3)]
    for cause in causes:
        assert decide(Ending(cause, 99, "x"), past[:2], launch).action == "restart"
        last = decide(Ending(cause, 99, "x"), past, launch)
        assert last.action == "stop"
        assert f"launch.restarts.{budget}" in last.reason


def test_a_node_is_excluded_the_second_time() -> None:
    """With the evidence of both attempts, and never more nodes than the cap."""
    bad = Ending("start_failure", 0, "x", bad_nodes={"n2": "rank 1 on n2 did not start"})
    first = ended("start_failure", 0, bad_nodes={"n2": "rank 1 on n2 did not start"})
    assert decide(bad, [], LAUNCH).action == "restart"
    assert decide(bad, [ended("start_failure", 0, bad_nodes={"n3": "x"})], LAUNCH).exclude == ()
    second = decide(bad, [first], LAUNCH)
    assert (second.action, second.exclude) == ("continue", ("n2",))
    assert evidence("n2", bad, 2, [first]) == [f"attempt {n}: rank 1 on n2 did not start" for n in (1, 2)]
    excluded = [{"event": "node_excluded", "node": f"m{i}"} for i in range(4)]
    assert decide(bad, [*excluded, first], LAUNCH).exclude == ()
    assert decide(bad, [*excluded[:3], first], LAUNCH).exclude == ("n2",)
