"""The batch process of a run: `python -m enc.launcher.supervise RUN_DIR -- srun ...`. No torch.

    prepare an attempt -> start its ranks -> watch them -> why did it end? -> again here | another job | stop

Why and what next are decided in `policy`; what a host can do (a SLURM job, or this machine in a rehearsal) is behind
`Host`. Every turn is an event in `events.jsonl`, written before it is taken.
"""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from enc.encoder.checkpoints.folder import find_checkpoint, list_checkpoints, read_trainer_state, remove_leftovers
from enc.encoder.config.launch import LaunchConfig
from enc.encoder.config.load import load_run
from enc.encoder.config.schema import RunConfig
from enc.encoder.errors import EncError, RunError, UsageError
from enc.encoder.heartbeat import read_rank_files
from enc.encoder.signals import STOP_SIGNALS
from enc.encoder.sizing.sizes import checkpoint_bytes
from enc.launcher.planning.plan import make_plan, render
from enc.launcher.run_folder.events import append_event, since_submitted
from enc.launcher.run_folder.lock import RunLock
from enc.launcher.run_folder.read import json_object, newest_attempt
from enc.launcher.run_folder.records import git_state, record_launch
from enc.launcher.supervise.deadline import Times, reserve_s
from enc.launcher.supervise.policy import Decision, Ending, RankEnd, classify, decide, evidence
from enc.launcher.supervise.watchdog import RankFiles, Watchdog, hang_text

_GRACE_S = 20.0  # for the other ranks, when one has failed
_READY_S = 60.0  # until then a signal waits for tasks that have not said a word
_WORTH_S = 120.0  # with less of the job's time left than this, ranks are not started again in it
_LATE_S = 5.0
_POLL_S = 0.25
_LOCK_PATIENCE_S = 60.0
_DISK_PATIENCE_S, _DISK_PAUSE_S = 1800.0, 5.0

T = TypeVar("T")


class Host(Protocol):
    """Where the ranks of an attempt run."""

    job: str
    nodes: list[str]
    restart_count: int

    def start(self, attempt: int, world_size: int) -> None:
        """Start all ranks."""

    def running(self) -> bool:
        """Tell whether any rank is left."""

    def signal(self, number: int) -> None:
        """Send a signal to all ranks."""

    def kill(self) -> None:
        """Kill what is left of the ranks, also those that are stopped."""

    def end_time(self) -> float | None:
        """Return when the job will be ended (Unix seconds), or None when nobody knows."""

    def said(self) -> str | None:
        """Return what the scheduler did to the job: cancelled, time_limit, preempted, requeued, or None."""

    def never_started(self) -> dict[int, str]:
        """Return ranks whose process ended by itself before it could say a word, with what is known of it."""

    def unhealthy(self) -> str | None:
        """Return why ranks cannot be started here again, or None."""

    def next_job(self, must_be_new: bool) -> str:
        """Ask for the job that goes on and return what was done; a requeued one ends this process soon."""

    def over(self) -> None:
        """The run needs no further job."""


@dataclass
class Attempt:
    """One start of all ranks, and what was seen of it."""

    number: int
    config: RunConfig
    world_size: int
    told: str | None = None  # the cause, when the supervisor itself stopped it
    files: RankFiles = field(default_factory=dict)


class Signals:
    """Stop signals that reached this process."""

    def __init__(self) -> None:
        self.got: list[int] = []
        for number in STOP_SIGNALS:
            signal.signal(number, lambda got, _frame: self.got.append(got))

    def take(self) -> int | None:
        return self.got.pop(0) if self.got else None


def say(text: str) -> None:
    """Write to the batch log."""
    with contextlib.suppress(OSError):  # the log lies on the run's disk, which may be full
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}", file=sys.stderr, flush=True)


def written(write: Callable[[], T]) -> T:
    """Write into the run folder, once its disk has room: what is not written down must not be acted upon.

    Raises RunError when the disk takes nothing for half an hour.
    """
    give_up = time.monotonic() + _DISK_PATIENCE_S
    while True:
        try:
            return write()
        except OSError as error:
            say(f"The run folder cannot be written: {error}.")
            if time.monotonic() > give_up:
                raise RunError(f"The run folder cannot be written: {error}. Then `enc resume latest`.") from None
            time.sleep(_DISK_PAUSE_S)


def supervise(run_dir: Path, host: Host) -> int:
    """Take a run as far as this job can; return the exit code of the job."""
    signals = Signals()
    lock = RunLock(run_dir, _LOCK_PATIENCE_S, host.job)
    try:
        return _supervise(run_dir, host, signals)
    finally:
        lock.release()


def _supervise(run_dir: Path, host: Host, signals: Signals) -> int:
    history = since_submitted(run_dir)
    if why := _why_not_to_begin(history):
        say(why)
        host.over()
        return 0
    decision = _after_lost_job(run_dir, history)
    while decision is None or decision.action == "restart":
        ending, launch, number = _attempt(run_dir, host, signals)
        decision = _decide(run_dir, host, ending, launch, number)
    if decision.action == "continue":
        return 75
    host.over()
    return decision.code


# --- before an attempt -----------------------------------------------------------------------------------------------


def _why_not_to_begin(history: list[dict[str, Any]]) -> str | None:
    """Return why a job that was queued earlier has nothing to do any more, or None."""
    for event in history:
        if event["event"] == "cancelled":
            return f"The run was cancelled by {event.get('by', 'somebody')}; nothing is started."
        if event["event"] == "attempt_ended" and event["decision"] == "stop":
            return f"The run has ended ({event['cause']}); nothing is started."
    return None


def _after_lost_job(run_dir: Path, history: list[dict[str, Any]]) -> Decision | None:
    """Close an attempt whose job vanished without a word; return a decision to stop when that was once too often."""
    names = [event["event"] for event in history if event["event"] in ("attempt", "attempt_ended")]
    if not names or names[-1] == "attempt_ended":
        return None
    last = [event for event in history if event["event"] == "attempt"][-1]
    number = last["attempt"]
    step = max((file.get("step", 0) for file in read_rank_files(run_dir, number).values()), default=0)
    detail = (
        f"Job {last['job']} on {', '.join(last['nodes'])} vanished without a word (a node failed, or it was killed)."
    )
    ending = Ending("lost_job", step, detail, saved=_newest_step(run_dir))
    decision = decide(ending, history, load_run(run_dir).launch)
    _record(run_dir, number, ending, decision, decision.action)
    if decision.action == "stop":
        say(decision.reason)
    return decision


def _attempt(run_dir: Path, host: Host, signals: Signals) -> tuple[Ending, LaunchConfig, int]:
    """Prepare and run one attempt; return how it ended, the launch settings, and its number."""
    launch = LaunchConfig()
    number = newest_attempt(run_dir) or 0
    try:
        config = load_run(run_dir)
        launch = config.launch
        config = _with_checkpoint(run_dir, config)
        if _make_store(run_dir, config, signals) is not None:
            cause = _said(run_dir, host) or "signal"
            return Ending(cause, 0, "A signal came while text was tokenised."), launch, number
        attempt = _record_attempt(run_dir, host, config)
    except EncError as error:
        say(str(error))
        cause = "config" if isinstance(error, UsageError) else "crash"
        return Ending(cause, 0, str(error), str(error)), launch, number
    host.start(attempt.number, attempt.world_size)
    _watch(run_dir, host, signals, attempt)
    return _ending(run_dir, host, attempt), launch, attempt.number


def _with_checkpoint(run_dir: Path, config: RunConfig) -> RunConfig:
    """Point the config at the run's newest complete checkpoint; before the first one it stays as it was submitted.

    Raises UsageError when there are checkpoints but none is complete: a run never starts from scratch by itself.
    """
    remove_leftovers(run_dir)
    if not list_checkpoints(run_dir):
        return config
    folder, passed_over = find_checkpoint(run_dir, "latest")
    for status in passed_over:
        say(f"Passed over checkpoint {status.path}: it is {status.state} ({'; '.join(status.problems[:2])}).")
    return config.changed({"trainer.resume_from_checkpoint": str(folder.absolute())})


def _make_store(run_dir: Path, config: RunConfig, signals: Signals) -> int | None:
    """Tokenise the text if that is still to be done; return the signal that interrupted it, if one did.

    Raises UsageError or RunError with what the command said.
    """
    if make_plan(config).store_ready:
        return None
    say("Tokenising the text.")
    program = [sys.executable, "-c", "from enc.launcher.cli.app import main; main()"]
    log = run_dir / "logs" / "preprocess.log"
    with log.open("a") as output:
        began = output.tell()
        child = subprocess.Popen([*program, "preprocess", str(run_dir / "config.yaml")], stdout=output, stderr=output)
    while child.poll() is None:
        if (number := signals.take()) is not None:
            child.kill()  # what it has written is whole; the next attempt goes on from there
            child.wait()
            return number
        time.sleep(_POLL_S)
    if child.returncode:
        said = log.read_bytes()[began:].decode(errors="replace").strip().removeprefix("enc: ")
        kind = UsageError if child.returncode == 2 else RunError
        raise kind(said or f"Tokenising ended with code {child.returncode} and no word; see {log}.")
    return None


def _record_attempt(run_dir: Path, host: Host, config: RunConfig) -> Attempt:
    """Write what the ranks will read, and what is known of this attempt."""
    plan = make_plan(config)
    number = written(lambda: record_launch(run_dir, render(plan), sys.argv, plan.as_dict(), host.job))
    resumes = config.trainer.resume_from_checkpoint
    step = read_trainer_state(Path(str(resumes)))["step"] if resumes else 0
    details = {"nodes": host.nodes, "restart_count": host.restart_count, "from_step": step}
    written(lambda: append_event(run_dir, "attempt", attempt=number, job=host.job, **details))
    _compare_code(run_dir, number)
    say(f"Attempt {number} of {run_dir}: {plan.split.world_size} ranks on {', '.join(host.nodes)}, from step {step}.")
    return Attempt(number, plan.config, plan.split.world_size)


def _compare_code(run_dir: Path, number: int) -> None:
    """Note when the working folder's git state is not that of the attempt before."""
    before = json_object(run_dir / "launches" / str(number - 1) / "launch.json")  # a node that died may have spoilt it
    old, new = before.get("git"), git_state(Path.cwd())
    if before and old != new:
        with contextlib.suppress(OSError):
            append_event(run_dir, "code_changed", before=old, now=new)


# --- while it runs ---------------------------------------------------------------------------------------------------


def _watch(run_dir: Path, host: Host, signals: Signals, attempt: Attempt) -> None:
    """Stand by until no rank is left: relay signals, stop in time, end a hang or what a failure left over."""
    watchdog = Watchdog(attempt.config.launch.hang_timeout_s)
    look_every_s = max(_POLL_S, attempt.config.launch.heartbeat_s / 2)
    began = time.monotonic()
    looked_at, kill_at, wanted = 0.0, None, False
    while host.running():
        now = time.monotonic()
        if (number := signals.take()) is not None and not (number == signal.SIGUSR1 and _is_warning(host, attempt)):
            wanted = True
        if wanted and (len(attempt.files) == attempt.world_size or now - began > _READY_S):
            wanted = False  # a task that has only just begun would die of it
            host.signal(signal.SIGUSR1)
        if now - looked_at >= look_every_s:
            looked_at, attempt.files = now, read_rank_files(run_dir, attempt.number)
            wanted = _stop_in_time(host, attempt) or wanted
            if watchdog.look(attempt.files, now) and attempt.told != "hang":
                attempt.told, kill_at = "hang", now
                _note_hang(run_dir, attempt, watchdog, now)
            codes = [file.get("code") for file in attempt.files.values()]
            if kill_at is None and any(code not in (None, 0, 75) for code in codes):
                kill_at = now + _GRACE_S
            if kill_at is not None and len(codes) == attempt.world_size and None not in codes:
                kill_at = now  # nobody is left to wait for
        if kill_at is not None and now >= kill_at:
            kill_at = now + _GRACE_S
            host.kill()
        time.sleep(_POLL_S)
    attempt.files = _last_words(run_dir, attempt)


def _last_words(run_dir: Path, attempt: Attempt) -> RankFiles:
    """Read the ranks' files once more; a network file system may show those of other nodes some seconds late."""
    give_up = time.monotonic() + (0.0 if attempt.told == "hang" else _LATE_S)
    while True:
        files = read_rank_files(run_dir, attempt.number)
        said = [file for file in files.values() if file.get("code") is not None]
        if len(said) == attempt.world_size or time.monotonic() > give_up:
            return files
        time.sleep(_POLL_S)


def _is_warning(host: Host, attempt: Attempt) -> bool:
    """Tell whether a signal is SLURM's own warning of the time limit: the measured moment comes later, and counts."""
    end = host.end_time()
    return end is not None and end - time.time() < attempt.config.launch.slurm.signal_s + 65 and attempt.told is None


def _stop_in_time(host: Host, attempt: Attempt) -> bool:
    """Tell whether what saving and leaving takes, as measured, is all that is left of the job's time."""
    end = host.end_time()
    if end is None or attempt.told is not None:
        return False
    files = attempt.files.values()
    step_s = max((file["step_s"] for file in files if file.get("step_s")), default=None)
    save_s = max((file["save_s"] for file in files if file.get("save_s")), default=None)
    reserve = reserve_s(Times(step_s, save_s), checkpoint_bytes(attempt.config))
    left = end - time.time()
    if left > reserve:
        return False
    attempt.told = "time_limit"
    say(f"The job ends in {left:.0f} s; stopping may take {reserve:.0f} s. The run saves and leaves now.")
    return True


def _note_hang(run_dir: Path, attempt: Attempt, watchdog: Watchdog, now: float) -> None:
    ranks = watchdog.evidence(attempt.files, attempt.world_size, now)
    text = hang_text(ranks, watchdog.timeout_s)
    say(text)
    with contextlib.suppress(OSError):
        append_event(run_dir, "hang", attempt=attempt.number, ranks=ranks[:16], detail=text)


# --- after it --------------------------------------------------------------------------------------------------------


def _ending(run_dir: Path, host: Host, attempt: Attempt) -> Ending:
    """Put together the ranks' last words and what else is known."""
    per_node = attempt.world_size // len(host.nodes)
    dead = {rank: text for rank, text in host.never_started().items() if rank not in attempt.files}
    ends = []
    for rank in range(attempt.world_size):
        file = attempt.files.get(rank, {})
        ends.append(RankEnd(
            rank, file.get("host", host.nodes[rank // per_node]), file.get("last_phase") or file.get("phase", "start"),
            file.get("step", 0), file.get("code"), file.get("error") or dead.get(rank), file.get("lost_peer", False),
            reported=bool(file) or (bool(dead) and rank not in dead),  # the others were ended because of the dead ones
        ))  # fmt: skip
    return classify(ends, attempt.told, _said(run_dir, host))


def _said(run_dir: Path, host: Host) -> str | None:
    """Return what was done to the job: by `enc cancel`, or by SLURM."""
    cancelled = any(event["event"] == "cancelled" for event in since_submitted(run_dir))
    return "cancelled" if cancelled else host.said()


def _decide(run_dir: Path, host: Host, ending: Ending, launch: LaunchConfig, number: int) -> Decision:
    """Decide what follows, write it down, and ask for the next job if there is to be one."""
    history = since_submitted(run_dir)
    ending = replace(ending, saved=_newest_step(run_dir))
    decision = decide(ending, history, launch)
    for node in decision.exclude:
        against = evidence(node, ending, number, history)
        written(partial(append_event, run_dir, "node_excluded", node=node, evidence=against))
    if decision.action == "restart" and (why := _nearly_over(host) or host.unhealthy()):
        decision = Decision("continue", f"{decision.reason.rstrip('.')}. It cannot start again in this job: {why}")
    how = decision.action
    if how == "continue":
        how = "requeue" if ending.cause == "requeued" else _how(launch, decision)
    _record(run_dir, number, ending, decision, how)
    say(f"{ending.detail} -> {how}" + ("" if decision.reason == ending.detail else f": {decision.reason}"))
    if decision.action == "continue" and ending.cause != "requeued":
        return _continue(run_dir, host, decision)
    return decision


def _nearly_over(host: Host) -> str | None:
    """Return that the job's time is not worth another start; ranks that are stopped as they start look lost."""
    end = host.end_time()
    left = None if end is None else end - time.time()
    return None if left is None or left > _WORTH_S else f"it ends in {left:.0f} s."


def _how(launch: LaunchConfig, decision: Decision) -> str:
    kind = launch.slurm.continue_by
    return "resubmit" if decision.exclude or kind == "resubmit" else {"requeue": "requeue", "array": "next_task"}[kind]


def _newest_step(run_dir: Path) -> int:
    return max((int(path.name) for path in list_checkpoints(run_dir)), default=-1)


def _record(run_dir: Path, number: int, ending: Ending, decision: Decision, how: str) -> None:
    more = {"bad_nodes": ending.bad_nodes} if ending.bad_nodes else {}
    written(lambda: append_event(
        run_dir, "attempt_ended", attempt=number, cause=ending.cause, step=ending.step, detail=ending.detail,
        decision=how, reason=decision.reason, saved=ending.saved, **more,
    ))  # fmt: skip


def _continue(run_dir: Path, host: Host, decision: Decision) -> Decision:
    try:
        host.next_job(must_be_new=bool(decision.exclude))
    except UsageError as error:
        why = str(error).rstrip(".")
        text = f"The run is saved, but no further job could be had: {why}. Go on with `enc resume latest`."
        say(text)
        written(lambda: append_event(run_dir, "not_continued", detail=text))
        return Decision("stop", text, code=75)
    return decision
