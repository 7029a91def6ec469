"""Why an attempt ended, and what happens next. Pure: events and rank files in, a decision out.

    ranks' last words + what scheduler and supervisor know --classify--> Ending --decide--> Decision

| cause | means | next |
|---|---|---|
| finished, config, cancelled | done; the request is at fault; the operator said so | stop |
| signal, time_limit, preempted, requeued | the state was saved (or there was no time to) | another job |
| crash, hang, lost_rank, start_failure | an error, no progress, a process gone, a node that starts none | again here |
| lost_job | the whole job vanished without a word | the job that finds it goes on |

Each cause has a budget, and none goes on for ever: attempts that end at the same step count as one trouble.

A local run has no budget: its first ending is its last. The person who started it in the foreground sees why it ended
and decides; a run that began anew by itself would hide that, and a signal is their wish to stop it.
"""

from dataclasses import dataclass, field
from typing import Any

from enc.encoder.config.launch import LaunchConfig
from enc.encoder.events import Event

_STARTING = ("start", "build", "warm_up", "restore")
_STOP = ("finished", "config", "cancelled")
_EXIT_CODES = {"finished": 0, "config": 2, "cancelled": 75, "signal": 75}  # 3 for what failed
_NEXT_JOB = ("signal", "time_limit", "preempted", "requeued")
_UNCOUNTED = ("signal", "preempted", "requeued")  # somebody else's decisions: no trouble of this run
_BUDGETS = {
    "crash": "crash",
    "hang": "hang",
    "lost_rank": "lost_rank",
    "start_failure": "lost_rank",
    "lost_job": "lost_rank",
}


@dataclass(frozen=True)
class RankEnd:
    """A rank's last words; `code` is None when it left without any, negative when a signal killed it.

    A rank that never `reported` did not even get as far as a Python that runs.
    """

    rank: int
    node: str
    phase: str = "start"
    step: int = 0
    code: int | None = None
    error: str | None = None
    lost_peer: bool = False
    reported: bool = True

    @property
    def blames_itself(self) -> bool:
        """Whether it failed on its own, and was not ended because of another one."""
        return not self.reported or (self.code is not None and self.code not in (0, 75) and not self.lost_peer)

    @property
    def began(self) -> bool:
        """Whether it got as far as its first step."""
        return self.reported and self.phase not in _STARTING

    @property
    def how(self) -> str:
        """Tell in a few words how it ended."""
        if not self.reported:
            return f"rank {self.rank} on {self.node} did not start" + (f" ({self.error})" if self.error else "")
        if self.code is None:
            return f"rank {self.rank} on {self.node} vanished (last heard of: {self.phase}, step {self.step})"
        if self.code < 0:
            return f"rank {self.rank} on {self.node} was killed by signal {-self.code}"
        why = f": {self.error}" if self.error else ""
        return f"rank {self.rank} on {self.node} ended with code {self.code}{why}"


@dataclass(frozen=True)
class Ending:
    """How an attempt ended: the cause, the furthest step, a sentence, and nodes that are to blame for a bad start.

    `saved` is the step of the newest checkpoint, -1 when there is none, None when that is not known.
    """

    cause: str
    step: int
    detail: str
    error: str | None = None
    bad_nodes: dict[str, str] = field(default_factory=dict)  # node -> evidence
    saved: int | None = None


@dataclass(frozen=True)
class Decision:
    """What follows: `action` is stop, restart (in this job) or continue (in another job)."""

    action: str
    reason: str
    exclude: tuple[str, ...] = ()
    code: int = 0


def classify(ranks: list[RankEnd], stopped_for: str | None, interruption: str | None) -> Ending:
    """Find out why an attempt ended.

    Args:
        stopped_for: Cause for which the supervisor itself stopped it: `hang`, `time_limit`, or None.
        interruption: What was done to the job: `cancelled`, `time_limit`, `preempted`, `requeued`, or None.
    """
    step = max((end.step for end in ranks), default=0)
    if ranks and all(end.code == 0 for end in ranks):
        return Ending("finished", step, f"The run is finished at step {step}.")
    own = [end for end in ranks if end.code not in (None, 0, 75) and end.code > 0 and not end.lost_peer]
    at_fault = [end for end in own if end.code == 2]
    if at_fault and (at_fault[0].rank == 0 or not _bad_nodes(ranks)):  # on some nodes only, it is the nodes' fault
        error = at_fault[0].error
        return Ending("config", step, f"The request is at fault: {error or 'see the log of the rank'}", error)
    if interruption:
        return Ending(interruption, step, _INTERRUPTIONS[interruption])
    if stopped_for == "hang":
        return Ending("hang", step, "No rank made progress.")
    bad_nodes = _bad_nodes(ranks)
    if bad_nodes:
        return Ending("start_failure", step, "; ".join(bad_nodes.values()), bad_nodes=bad_nodes)
    if own:
        return Ending("crash", step, own[0].how[0].upper() + own[0].how[1:], own[0].error)
    silent = sorted((end for end in ranks if end.code is None or end.code < 0), key=lambda end: not end.blames_itself)
    if silent:
        return Ending("lost_rank", step, silent[0].how[0].upper() + silent[0].how[1:])
    if any(end.code == 75 for end in ranks):
        why = "The job's time was nearly over" if stopped_for == "time_limit" else "A signal came"
        return Ending(stopped_for or "signal", step, f"{why}; the run is saved at step {step}.")
    return Ending("lost_rank", step, "Ranks lost each other.")


_INTERRUPTIONS = {
    "cancelled": "The job was cancelled.",
    "time_limit": "The job reached its time limit.",
    "preempted": "The job was preempted.",
    "requeued": "The job was requeued.",
}


def _bad_nodes(ranks: list[RankEnd]) -> dict[str, str]:
    """Return the nodes whose ranks alone failed before the first step, each with the evidence.

    A failure on all nodes is no node's fault, and an error that only tells of another rank blames nobody.
    """
    failed = {end.node: end for end in ranks if end.blames_itself and not end.began}
    fine = {end.node for end in ranks} - set(failed)
    return {node: end.how for node, end in failed.items()} if fine else {}


def decide(ending: Ending, history: list[dict[str, Any]], launch: LaunchConfig, restarts: bool = True) -> Decision:
    """Choose what follows an ending.

    Args:
        history: Events `attempt_ended` and `node_excluded` since the run was submitted, without this ending.
        restarts: Whether a run goes on by itself where this one is (`Host.restarts`).
    """
    if ending.cause in _STOP or not restarts:
        return Decision("stop", ending.detail, code=_EXIT_CODES.get(ending.cause, 3))
    past = [event for event in history if event["event"] == Event.ATTEMPT_ENDED]
    stuck = 0 if ending.cause in _UNCOUNTED else 1 + _without_progress(ending, past)
    patience = launch.restarts.same_step * (1 if ending.cause in ("crash", "time_limit") else 2)
    if stuck >= patience:
        furthest = max([ending.step, *(event["step"] for event in past)])
        why = f": {ending.error}" if ending.error else f" ({ending.detail.rstrip('.')})"
        text = f"{stuck} attempts in a row got no further than step {furthest}, the last by {ending.cause}{why}. "
        return Decision("stop", f"{text}Find the cause, then `enc resume latest`.", code=3)
    budget = _BUDGETS.get(ending.cause)
    if budget is not None:
        used = sum(_BUDGETS.get(event["cause"]) == budget for event in past)
        allowed = getattr(launch.restarts, budget)
        if used >= allowed:
            text = f"launch.restarts.{budget} allows {allowed} restarts, and they are used up; the last attempt: "
            return Decision("stop", text + ending.detail, code=3)
    if ending.cause in _NEXT_JOB:
        return Decision("continue", ending.detail)
    exclude = _to_exclude(ending, history, launch.max_excluded_nodes)
    if exclude:
        return Decision("continue", f"{', '.join(exclude)} failed at the start twice and is excluded.", exclude)
    return Decision("restart", ending.detail)


def _without_progress(ending: Ending, past: list[dict[str, Any]]) -> int:
    """Count the last attempts in trouble before this one, back to one that made progress, if this one made none.

    Progress is a further step and a newer checkpoint: without one the next attempt begins where this one did.
    """
    made = [(event["step"], event.get("saved", event["step"])) for event in past]
    made.append((ending.step, ending.step if ending.saved is None else ending.saved))
    further = []  # of each attempt: whether it made progress
    furthest_step = newest_save = -1
    for step, saved in made:
        further.append(step > furthest_step and saved > newest_save)
        furthest_step, newest_save = max(furthest_step, step), max(newest_save, saved)
    if further[-1]:
        return 0
    count = 0
    for i in range(len(past) - 1, -1, -1):
        if past[i]["cause"] in _UNCOUNTED:
            continue
        count += 1
        if further[i]:
            break  # this one made progress: the first of those at this step
    return count


def _to_exclude(ending: Ending, history: list[dict[str, Any]], cap: int) -> tuple[str, ...]:
    excluded = {event["node"] for event in history if event["event"] == Event.NODE_EXCLUDED}
    before = {node for event in history for node in event.get("bad_nodes", {})}
    wanted = [node for node in ending.bad_nodes if node in before and node not in excluded]
    return tuple(wanted[: max(0, cap - len(excluded))])


def evidence(node: str, ending: Ending, attempt: int, history: list[dict[str, Any]]) -> list[str]:
    """Return what speaks against a node, attempt by attempt."""
    past = [f"attempt {e['attempt']}: {e['bad_nodes'][node]}" for e in history if node in e.get("bad_nodes", {})]
    return [*past, f"attempt {attempt}: {ending.bad_nodes[node]}"]
