"""What a run is doing: its files and its scheduler's word on its job become a `RunState`.

    read_files(run folder) -> RunFiles ─┐
    ask(all jobs at once) -> Answers ───┴─▶ state_of -> RunState

The files say how far the run got; whether it is alive is known from its lock on this host, from a scheduler, or from
what the ranks noted a moment ago. What is not known is None, and a state that cannot be told is `unknown`.
"""

import socket
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from enc.encoder.checkpoints.folder import checkpoints_dir, list_checkpoints, verify
from enc.encoder.events import EVENTS_FILE
from enc.encoder.heartbeat import read_rank_files
from enc.launcher.backends.registry import title_of
from enc.launcher.run_folder.history import History, history_of
from enc.launcher.run_folder.job import Job
from enc.launcher.run_folder.read import (
    Lock,
    config_number,
    count,
    json_lines,
    json_object,
    modified,
    newest_attempt,
    number,
    read_lock,
    seconds,
    tail,
    text,
    unreadable,
)

ACTIVE = ("queued", "requeued", "starting", "restarting", "running", "stopping", "hung?")
OVER = ("finished", "stopped", "failed", "cancelled", "lost")
_BUSY = ("forward", "backward", "optimizer", "data_wait", "evaluate", "save")
_READ = (".lock", "checkpoints", "config.yaml", "events.jsonl", "launches", "logs", "metrics.jsonl")
_RECENT = 20  # records that rates are taken from


@dataclass(frozen=True)
class RunFiles:
    """What the files of a run folder say."""

    dir: Path
    history: History
    records: list[dict[str, Any]]
    lock: Lock
    launch: dict[str, Any]
    attempt: int | None
    ranks: list[dict[str, Any]]
    total_steps: int | None
    hang_timeout_s: float
    heartbeat_s: float
    unreadable: list[str]

    @property
    def jobs(self) -> list[str]:
        """The jobs of the run that may still be there, the newest first; none of a local one."""
        if self.history.attempt is not None and self.history.job is None:
            return []
        if self.history.jobs:  # the first one stands for a whole array, whose tasks have ids of their own
            newest = [self.history.job] if self.history.job else []
            return list(dict.fromkeys([*newest, *self.history.jobs[:-_RECENT:-1], self.history.jobs[0]]))
        job = text(self.launch.get("job"))
        return [job] if job else []


@dataclass
class RunState:
    """A run at one moment. Times are in seconds; None is unknown or not there."""

    run: str
    state: str = "unknown"
    """One of ACTIVE or OVER, or unknown."""
    detail: str | None = None
    alive: bool | None = None
    attempt: int | None = None
    job: str | None = None
    scheduler: str | None = None
    """What people call the one that has the job."""
    job_waits: bool = False
    job_state: str | None = None
    """In the scheduler's words, like the three that follow."""
    job_reason: str | None = None
    job_elapsed: str | None = None
    job_time_limit: str | None = None
    nodes: list[str] = field(default_factory=list)
    num_nodes: int | None = None
    host: str | None = None
    pid: int | None = None
    step: int | None = None
    total_steps: int | None = None
    loss: float | None = None
    loss_is_finite: bool | None = None
    tokens_per_s: float | None = None
    s_per_step: float | None = None
    eta_s: float | None = None
    phases: dict[str, int] = field(default_factory=dict)
    heard_s: float | None = None
    """How long ago the run was last heard of: events, metrics, notes of ranks."""
    silent_ranks: list[dict[str, Any]] = field(default_factory=list)
    checkpoint: dict[str, Any] | None = None
    passed_over: int = 0
    """Newer checkpoint folders that are not complete."""
    why: str | None = None
    restarts: dict[str, int] = field(default_factory=dict)
    excluded_nodes: list[str] = field(default_factory=list)
    straggler: dict[str, Any] | None = None
    unreadable: list[str] = field(default_factory=list)
    """Files of the run that may not be read by the one who looks."""
    progress_s: float | None = None
    """How long ago there was an event or a metrics record."""


# --- files -----------------------------------------------------------------------------------------------------------


def read_files(run_dir: Path, brief: bool = False) -> RunFiles:
    """Read a run folder; `brief` reads only the last lines of its files."""
    history = history_of(json_lines(run_dir / EVENTS_FILE, 2**14 if brief else -1))
    newest = newest_attempt(run_dir)
    attempt = history.attempt if history.attempt is not None else newest
    config = tail(run_dir / "config.yaml", 2**18).decode(errors="replace")
    total = config_number(config, "trainer", "max_steps")
    return RunFiles(
        dir=run_dir,
        history=history,
        records=json_lines(run_dir / "metrics.jsonl", 2**12 if brief else 2**16),
        lock=read_lock(run_dir),
        launch=json_object(run_dir / "launches" / str(newest) / "launch.json"),
        attempt=attempt,
        ranks=[] if history.status in OVER or attempt is None else list(read_rank_files(run_dir, attempt).values()),
        total_steps=None if total is None else int(total),
        hang_timeout_s=_launch_number(config, "hang_timeout_s"),
        heartbeat_s=_launch_number(config, "heartbeat_s"),
        unreadable=unreadable(run_dir, _READ),
    )


def _launch_number(config: str, key: str) -> float:
    """Return a number of the section `launch` in a rendered config.yaml, or its default where that is not whole."""
    found = config_number(config, "launch", key)
    if found is None:
        from enc.encoder.config.launch import LaunchConfig  # takes longer than looking at a run

        found = float(LaunchConfig.model_fields[key].default)
    return found


def last_checkpoint(run_dir: Path, now: float) -> tuple[dict[str, Any] | None, int]:
    """Return the newest checkpoint that is complete by names and sizes, and how many newer ones are not."""
    passed_over = 0
    try:
        for path in reversed(list_checkpoints(run_dir)):
            status = verify(path, contents=False)
            if status.state == "complete":
                written = modified(path / "manifest.json")
                age_s = None if written is None else now - written
                found = {"step": status.step, "path": str(path), "bytes": status.num_bytes, "age_s": age_s}
                return found, passed_over
            passed_over += 1
    except OSError:  # somebody else's folder, or one that is being deleted
        if not checkpoints_dir(run_dir).exists():
            return None, 0
    return None, passed_over


# --- their state -----------------------------------------------------------------------------------------------------


def state_of(files: RunFiles, jobs: dict[str, Job] | None, now: float) -> RunState:
    """Say what a run is doing; `jobs` is what its scheduler knows of its jobs, None when that could not be asked."""
    history = files.history
    known = [found for name in files.jobs if (found := (jobs or {}).get(name)) is not None]
    job = next((found for found in known if not found.is_over), known[0] if known else None)
    state = RunState(
        run=str(files.dir),
        attempt=files.attempt,
        job=job.id if job else next(iter(files.jobs), None),
        scheduler=title_of(files.jobs[0]) if files.jobs else None,
        nodes=[] if job and job.waits else history.nodes,
        num_nodes=history.num_nodes,
        host=files.lock.host or text(files.launch.get("host")),
        pid=files.lock.pid,
        total_steps=files.total_steps,
        why=history.why,
        restarts=dict(history.restarts),
        excluded_nodes=history.excluded_nodes,
        straggler=history.straggler,
        unreadable=files.unreadable,
    )
    if job:
        state.scheduler, state.job_waits = job.scheduler, job.waits
        state.job_state, state.job_reason = job.state, job.reason
        state.job_elapsed, state.job_time_limit = job.elapsed, job.time_limit
    _note_progress(state, files, now)
    state.alive = _is_alive(files, job, jobs is not None, now)
    state.state, state.detail = _state(files, job, state, now)
    if state.state in ACTIVE:
        _note_ranks(state, files, now)
        state.eta_s = _eta(state)
    return state


def _note_progress(state: RunState, files: RunFiles, now: float) -> None:
    """Fill in step, loss and rates from the newest records, and when the run was last heard of."""
    history = files.history
    records = [r for r in files.records if count(r.get("step")) is not None and number(r.get("time")) is not None]
    trained = [r for r in records if "loss" in r and "tokens_per_s" in r][-_RECENT:]
    steps = [(record["time"], record["step"]) for record in records[-1:]]
    if history.step is not None:
        steps.append((history.step_time or 0.0, history.step))
    steps += [
        (note["time"], note["step"])
        for note in files.ranks[:1]
        if note.get("phase") in _BUSY and number(note.get("time")) is not None and count(note.get("step")) is not None
    ]
    state.step = max(steps)[1] if steps else None
    if trained:
        state.loss = number(trained[-1]["loss"])
        state.loss_is_finite = state.loss is not None
        rates = [rate for record in trained if (rate := number(record["tokens_per_s"])) is not None]
        state.tokens_per_s = statistics.median(rates) if rates else None
        state.s_per_step = _seconds_per_step(trained, history.began or 0.0)
    written = [t for r in records[-1:] if (t := number(r["time"])) is not None]
    noted = [t for note in files.ranks if (t := number(note.get("time"))) is not None]
    launched = seconds(files.launch.get("time"))
    progress = [t for t in (history.time, launched, *written) if t is not None]
    state.progress_s = now - max(progress) if progress else None
    state.heard_s = now - max([*progress, *noted]) if progress or noted else None


def _seconds_per_step(trained: list[dict[str, Any]], began: float) -> float | None:
    """Return wall seconds a step, evaluations and saves included where several records of this attempt show them."""
    here = [record for record in trained if record["time"] >= began]
    if len(here) > 1 and here[-1]["step"] > here[0]["step"] and here[-1]["time"] > here[0]["time"]:
        step_s: float = (here[-1]["time"] - here[0]["time"]) / (here[-1]["step"] - here[0]["step"])
        return step_s
    taken = number(trained[-1].get("step_s"))
    return taken if taken and taken > 0 else None


def _eta(state: RunState) -> float | None:
    if state.s_per_step is None or state.total_steps is None or state.step is None:
        return None
    return max(0, state.total_steps - state.step) * state.s_per_step


def _note_ranks(state: RunState, files: RunFiles, now: float) -> None:
    """Count the phases that ranks are in and name those that have not been heard of for a while."""
    for note in files.ranks:
        phase = text(note.get("phase")) or "unknown"
        state.phases[phase] = state.phases.get(phase, 0) + 1
        silent_s = now - (number(note.get("time")) or 0.0)
        if phase != "ended" and silent_s > _patience(files):
            state.silent_ranks.append({"rank": note["rank"], "host": text(note.get("host")), "silent_s": silent_s})


def _patience(files: RunFiles) -> float:
    return max(60.0, 12 * files.heartbeat_s)


def _is_alive(files: RunFiles, job: Job | None, answered: bool, now: float) -> bool | None:
    """Tell whether a process of the run lives; a job that waits has none."""
    if files.lock.held:
        return True
    if files.jobs and answered:
        return job is not None and not job.is_over and not job.waits
    noted = [now - t for n in files.ranks if n.get("phase") != "ended" and (t := number(n.get("time"))) is not None]
    if noted and abs(min(noted, key=abs)) < 3 * files.heartbeat_s:
        return True
    on_this_host = (files.lock.host or text(files.launch.get("host"))) == socket.gethostname()
    if not files.jobs and on_this_host and files.lock.held is False:
        return False
    return None


def _state(files: RunFiles, job: Job | None, state: RunState, now: float) -> tuple[str, str | None]:
    """Return the word for a run's state and, where it needs one, a sentence."""
    history, status = files.history, _launched_again(files)
    if "events.jsonl" in files.unreadable:
        return "unknown", "Its events may not be read by you."
    if state.job_waits and (status not in OVER or status == "cancelled"):
        if status == "cancelled":
            return "cancelled", "Its job is still in the queue."
        by_scheduler = status in ("starting", "running", "restarting", "signal", "hang", "failing")
        return ("queued", None) if status == "queued" else (
            "requeued", f"{state.scheduler} put its job back into the queue." if by_scheduler else None)  # fmt: skip
    if status in ("signal", "cancelled") and state.alive:
        return "stopping", "It saves its state and ends."
    saved = f"Its state of step {history.signal_step} is saved." if history.signal_step in history.saved else None
    if status == "signal":
        if saved:
            return "stopped", saved
        return ("lost", "It ended before its state was saved.") if state.alive is False else _unknown(files, "stopping")
    if status in OVER:
        return status, saved if status in ("stopped", "cancelled") else None
    if status == "failing":
        return ("stopping", "It failed.") if state.alive else ("failed", None)
    if state.alive:
        return _alive_state(files, status, state)
    if state.alive is False:
        return _gone(files, job, state, status)
    return _unknown(files, status)


def _launched_again(files: RunFiles) -> str:
    """Return the status of the events, or `starting` after a launch that has not told of itself yet."""
    launched, last_event = seconds(files.launch.get("time")), files.history.time
    if launched is not None and (last_event is None or launched > last_event) and files.history.status != "starting":
        return "starting"
    return files.history.status


def _alive_state(files: RunFiles, status: str, state: RunState) -> tuple[str, str | None]:
    if status == "hang":
        return "hung?", files.history.why
    noted = [t for note in files.ranks if note.get("phase") != "ended" and (t := number(note.get("time"))) is not None]
    newest = max(noted, default=None)
    if newest is not None and state.heard_s is not None and state.heard_s > _patience(files):
        return "hung?", "Its ranks are silent."
    if newest is None and status == "running" and (state.progress_s or 0) > files.hang_timeout_s:
        return "hung?", "It has logged nothing for a long time."
    return {"queued": "starting", "requeued": "restarting", "unknown": "running"}.get(status, status), None


def _gone(files: RunFiles, job: Job | None, state: RunState, status: str) -> tuple[str, str]:
    """Word the end of a run that did not tell of it."""
    if job is not None and job.was_cancelled:
        return "cancelled", f"{job.scheduler} says that its job was cancelled."
    if files.history.not_continued:
        return "stopped", "No further job could be had."
    if not files.jobs:
        if (modified(files.dir / "logs" / "traceback-rank0.txt") or 0.0) >= (
            seconds(files.launch.get("time")) or 1e300
        ):
            return "failed", "Its traceback is in logs/traceback-rank0.txt."
        return "lost", "Its process is gone without a word."
    word = f"says {job.state}" if job else f"does not know job {files.jobs[0]} any more"
    never = status in ("queued", "requeued") and not files.history.attempt
    return "lost", f"{state.scheduler} {word}; {'it never started' if never else 'its process is gone without a word'}."


def _unknown(files: RunFiles, status: str) -> tuple[str, str]:
    last = {"signal": "stopping", "hang": "hung"}.get(status, status)
    if not files.jobs and files.lock.host not in (None, socket.gethostname()):
        why = f"it ran on {files.lock.host}, which cannot be seen from here"
    elif not files.jobs:
        why = "it has no lock that can be read"
    else:
        why = f"{title_of(files.jobs[0])} could not be asked"
    known = "Its events do not tell" if status == "unknown" else f"Last known to be {last}"
    return "unknown", f"{known}; {why}."
