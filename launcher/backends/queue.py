"""Queueing a run, with any scheduler that takes a job script: what is written when, and what a failure undoes."""

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from enc.encoder.config.schema import RunConfig
from enc.encoder.events import Event, append_event
from enc.encoder.files import replace_atomically
from enc.encoder.printable import Say
from enc.launcher.machine.rank_environment import blocked_stop_signals
from enc.launcher.planning.plan import Plan
from enc.launcher.planning.plan_text import plan_notes
from enc.launcher.planning.render import self_contained
from enc.launcher.planning.resume import set_aside
from enc.launcher.run_folder.lock import RunLock
from enc.launcher.run_folder.records import git_state, move_aside, move_back
from enc.launcher.run_folder.snapshot import snapshot_code


@dataclass(frozen=True)
class JobScript:
    """A job script, and the scheduler's ways to take it and to give it up."""

    name: str
    text: str
    submit: Callable[[Path], str]  # a script, which is copied -> the job's id
    cancel: Callable[[str], object]
    details: Mapping[str, Any] = field(default_factory=dict)  # for the event


def queue_run(plan: Plan, lock: RunLock, script: JobScript, say: Say) -> str:
    """Write the folder of a run and queue its job; return the job's id. Raises UsageError, and nothing is left."""
    for note in plan_notes(plan):
        say(note)
    with blocked_stop_signals():  # a job that is queued needs its files
        job = _queue(plan, lock, script, say)
    lock.release()  # the job waits for this
    say(_queued_text(plan, job))
    return job


def submitted_config(plan: Plan) -> RunConfig:
    """Return the config that a job starts from.

    What is not known here is left to the job: text that is not tokenised yet keeps its place, relative to the job's
    working folder, and `auto` stays the engine where the memory of the nodes' GPUs is not given.
    """
    updates = {"trainer.output_dir": str(plan.run_dir), "launch.site": None}
    if plan.asked_engine == "auto" and plan.device_bytes is None:
        updates["parallel.engine"] = "auto"
    if plan.store_ready:
        return self_contained(plan).changed(updates)
    return plan.config.changed(updates | {"dataset.pre_tokenize_output": str(plan.store)})


def _queued_text(plan: Plan, job: str) -> str:
    nodes, ranks = plan.config.launch.num_nodes, plan.config.launch.nproc_per_node
    return (
        f"Job {job} is queued: {nodes} node{'s' if nodes > 1 else ''} x {ranks} rank{'s' if ranks != 1 else ''}, "
        f"{plan.engine}, in {plan.run_dir}.\nWatch it with `enc status {job}` and `enc logs -f {job}`; "
        f"`enc cancel {job}` ends it."
    )


def _queue(plan: Plan, lock: RunLock, script: JobScript, say: Say) -> str:
    """Queue the job and write what it starts from.

    When the scheduler refuses it, an older run is put back in its place; when its files cannot be written, it is
    cancelled.
    """
    run_dir, checkpoint = plan.run_dir, plan.config.trainer.resume_from_checkpoint
    moved_to = None if checkpoint else move_aside(run_dir, say)
    try:
        job = hand_over(plan, script)
    except BaseException:
        if moved_to:
            move_back(moved_to, run_dir, say)
        raise
    try:
        lock.belongs_to(job)
        if checkpoint:
            set_aside(run_dir, Path(str(checkpoint)), say)
        _write_run(plan, script, job)
    except BaseException:
        script.cancel(job)
        raise
    return job


def hand_over(plan: Plan, script: JobScript) -> str:
    """Hand the script to the scheduler, which keeps a copy; the run's own files are written once it was accepted."""
    new = not (plan.run_dir / "logs").exists()
    path = plan.run_dir / f".{script.name}"
    (plan.run_dir / "logs").mkdir(exist_ok=True)
    try:
        if plan.config.launch.snapshot_code:  # before it is queued: a job that starts at once imports from it
            snapshot_code(plan.run_dir)
        path.write_text(script.text)
        job = script.submit(path)
        path.replace(plan.run_dir / script.name)
        return job
    except BaseException:
        path.unlink(missing_ok=True)
        if new:
            (plan.run_dir / "logs").rmdir()
            shutil.rmtree(plan.run_dir / "code", ignore_errors=True)
        raise


def _write_run(plan: Plan, script: JobScript, job: str) -> None:
    """Write the config that the job starts from, and the event."""
    launch = plan.config.launch
    replace_atomically(plan.run_dir / "config.yaml", submitted_config(plan).to_yaml())
    append_event(
        plan.run_dir, Event.SUBMITTED, job=job, nodes=launch.num_nodes, nproc_per_node=launch.nproc_per_node,
        script=script.name, **script.details, command=shlex.join(sys.argv), git=git_state(Path.cwd()),
        user=os.environ.get("USER", ""),
    )  # fmt: skip
