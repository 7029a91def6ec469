"""The batch process of a run: `python -m enc.launcher.supervise RUN_DIR -- srun ...`. No torch.

    prepare an attempt -> start its ranks -> watch them -> why did it end? -> again here | another job | stop

An attempt itself is in `attempt`, why it ended and what is next are decided in `policy`, and what a host can do (a job,
or this machine) is behind `Host`. Each decision is an event in `events.jsonl`, written before it is acted upon.
A local run has one attempt, which the launching process prepares: `supervise_here`.
"""

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from enc.encoder.checkpoints.folder import find_checkpoint, list_checkpoints, read_trainer_state, remove_leftovers
from enc.encoder.config.launch import LaunchConfig
from enc.encoder.config.load import load_run
from enc.encoder.config.schema import RunConfig
from enc.encoder.errors import EncError, RunError, UsageError
from enc.encoder.events import Event, append_event
from enc.encoder.heartbeat import read_rank_files
from enc.launcher.machine.facts import look
from enc.launcher.planning.plan import Plan, after_tokenising, plan_run
from enc.launcher.planning.render import render
from enc.launcher.planning.token_store import look_at_store
from enc.launcher.run_folder.events import since_submitted
from enc.launcher.run_folder.lock import RunLock
from enc.launcher.run_folder.read import json_object, newest_attempt
from enc.launcher.run_folder.records import git_state, record_launch
from enc.launcher.supervise.attempt import POLL_S, Attempt, run_attempt, say
from enc.launcher.supervise.host import Host
from enc.launcher.supervise.policy import Decision, Ending, classify, decide, evidence
from enc.launcher.supervise.signals import Signals

_WORTH_S = 120.0  # with less of the job's time left than this, ranks are not started again in it
_LOCK_PATIENCE_S = 60.0
_DISK_PATIENCE_S, _DISK_PAUSE_S = 1800.0, 5.0

T = TypeVar("T")


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
    with Signals() as signals:
        lock = RunLock(run_dir, lambda jobs: {}, _LOCK_PATIENCE_S, host.job)
        try:
            return _supervise(run_dir, host, signals)
        finally:
            lock.release()


def supervise_here(host: Host, attempt: Attempt, signals: Signals) -> int:
    """Take an attempt that its launch has prepared and recorded to its end; return the exit code.

    Nothing but the ranks' own events is written: whoever started the run in the foreground sees how it ends.
    """
    ending = classify(run_attempt(host, attempt, signals), attempt.stopped_for, host.interruption())
    return decide(ending, [], attempt.config.launch, host.restarts).code


def _supervise(run_dir: Path, host: Host, signals: Signals) -> int:
    history = since_submitted(run_dir)
    if why := _why_not_to_begin(history):
        say(why)
        host.drop_next_jobs()
        return 0
    decision = _after_lost_job(run_dir, host, history)
    while decision is None or decision.action == "restart":
        ending, launch, number = _attempt(run_dir, host, signals)
        decision = _decide(run_dir, host, ending, launch, number)
    if decision.action == "continue":
        return 75
    host.drop_next_jobs()
    return decision.code


# --- before an attempt -----------------------------------------------------------------------------------------------


def _why_not_to_begin(history: list[dict[str, Any]]) -> str | None:
    """Return why a job that was queued earlier has nothing to do any more, or None."""
    for event in history:
        if event["event"] == Event.CANCELLED:
            return f"The run was cancelled by {event.get('by', 'somebody')}; nothing is started."
        if event["event"] == Event.ATTEMPT_ENDED and event["decision"] == "stop":
            return f"The run has ended ({event['cause']}); nothing is started."
    return None


def _after_lost_job(run_dir: Path, host: Host, history: list[dict[str, Any]]) -> Decision | None:
    """Close an attempt whose job vanished without a word; return a decision to stop when that was once too often."""
    names = [event["event"] for event in history if event["event"] in (Event.ATTEMPT, Event.ATTEMPT_ENDED)]
    if not names or names[-1] == "attempt_ended":
        return None
    last = [event for event in history if event["event"] == Event.ATTEMPT][-1]
    number = last["attempt"]
    step = max((file.get("step", 0) for file in read_rank_files(run_dir, number).values()), default=0)
    detail = (
        f"Job {last['job']} on {', '.join(last['nodes'])} vanished without a word (a node failed, or it was killed)."
    )
    ending = Ending("lost_job", step, detail, saved=_newest_step(run_dir))
    decision = decide(ending, history, load_run(run_dir).launch, host.restarts)
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
        plan = plan_run(config, look(job=host.job))
        if not plan.store_ready:
            if _make_store(run_dir, signals) is not None:
                cause = _interruption(run_dir, host) or "signal"
                return Ending(cause, 0, "A signal came while text was tokenised."), launch, number
            plan = after_tokenising(plan, look_at_store(config.dataset))
        attempt = _record_attempt(run_dir, host, plan)
    except EncError as error:
        say(str(error))
        cause = "config" if isinstance(error, UsageError) else "crash"
        return Ending(cause, 0, str(error), str(error)), launch, number
    ends = run_attempt(host, attempt, signals)
    return classify(ends, attempt.stopped_for, _interruption(run_dir, host)), launch, attempt.number


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


def _make_store(run_dir: Path, signals: Signals) -> int | None:
    """Tokenise the text; return the signal that interrupted it, if one did.

    Raises UsageError or RunError with what the command said.
    """
    say("Tokenising the text.")
    program = [sys.executable, "-P", "-c", "from enc.launcher.cli.app import main; main()"]
    log = run_dir / "logs" / "preprocess.log"
    with log.open("a") as output:
        began = output.tell()
        child = subprocess.Popen([*program, "preprocess", str(run_dir / "config.yaml")], stdout=output, stderr=output)
    while child.poll() is None:
        if (number := signals.take()) is not None:
            child.kill()  # what it has written is whole; the next attempt goes on from there
            child.wait()
            return number
        signals.wait(POLL_S)
    if child.returncode:
        output_text = log.read_bytes()[began:].decode(errors="replace").strip().removeprefix("enc: ")
        kind = UsageError if child.returncode == 2 else RunError
        raise kind(output_text or f"Tokenising ended with code {child.returncode} and no word; see {log}.")
    return None


def _record_attempt(run_dir: Path, host: Host, plan: Plan) -> Attempt:
    """Write what the ranks will read, and what is known of this attempt."""
    number = written(lambda: record_launch(run_dir, render(plan), sys.argv, plan.as_dict(), host.job))
    resumes = plan.config.trainer.resume_from_checkpoint
    step = read_trainer_state(Path(str(resumes)))["step"] if resumes else 0
    details = {"nodes": host.nodes, "restart_count": host.restart_count, "from_step": step}
    written(lambda: append_event(run_dir, Event.ATTEMPT, attempt=number, job=host.job, **details))
    _compare_code(run_dir, number)
    say(f"Attempt {number} of {run_dir}: {plan.split.world_size} ranks on {', '.join(host.nodes)}, from step {step}.")
    return Attempt(run_dir, number, plan.config, plan.split.world_size)


def _compare_code(run_dir: Path, number: int) -> None:
    """Note when the working folder's git state is not that of the attempt before."""
    before = json_object(run_dir / "launches" / str(number - 1) / "launch.json")  # a node that died may have spoilt it
    old, new = before.get("git"), git_state(Path.cwd())
    if before and old != new:
        with contextlib.suppress(OSError):
            append_event(run_dir, Event.CODE_CHANGED, before=old, now=new)


# --- after it --------------------------------------------------------------------------------------------------------


def _interruption(run_dir: Path, host: Host) -> str | None:
    """Return what was done to the job: by `enc cancel`, or by the scheduler."""
    cancelled = any(event["event"] == Event.CANCELLED for event in since_submitted(run_dir))
    return "cancelled" if cancelled else host.interruption()


def _decide(run_dir: Path, host: Host, ending: Ending, launch: LaunchConfig, number: int) -> Decision:
    """Decide what follows, write it down, and ask for the next job if there is to be one."""
    history = since_submitted(run_dir)
    ending = replace(ending, saved=_newest_step(run_dir))
    decision = decide(ending, history, launch, host.restarts)
    for node in decision.exclude:
        against = evidence(node, ending, number, history)
        written(partial(append_event, run_dir, Event.NODE_EXCLUDED, node=node, evidence=against))
    if decision.action == "restart" and (why := _nearly_over(host) or host.unhealthy()):
        decision = Decision("continue", f"{decision.reason.rstrip('.')}. It cannot start again in this job: {why}")
    how = decision.action
    if how == "continue":
        how = "requeue" if ending.cause == "requeued" else host.next_job_by(must_be_new=bool(decision.exclude))
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


def _newest_step(run_dir: Path) -> int:
    return max((int(path.name) for path in list_checkpoints(run_dir)), default=-1)


def _record(run_dir: Path, number: int, ending: Ending, decision: Decision, how: str) -> None:
    more = {"bad_nodes": ending.bad_nodes} if ending.bad_nodes else {}
    written(lambda: append_event(
        run_dir, Event.ATTEMPT_ENDED, attempt=number, cause=ending.cause, step=ending.step, detail=ending.detail,
        decision=how, reason=decision.reason, saved=ending.saved, **more,
    ))  # fmt: skip


def _continue(run_dir: Path, host: Host, decision: Decision) -> Decision:
    try:
        host.next_job(must_be_new=bool(decision.exclude))
    except UsageError as error:
        why = str(error).rstrip(".")
        text = f"The run is saved, but no further job could be had: {why}. Go on with `enc resume latest`."
        say(text)
        written(lambda: append_event(run_dir, Event.NOT_CONTINUED, detail=text))
        return Decision("stop", text, code=75)
    return decision
