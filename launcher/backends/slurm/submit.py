"""Sending a run to SLURM: checks, files, sbatch. What happens in the job is `supervise`."""

import os
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from enc.encoder.config.schema import RunConfig
from enc.encoder.events import Event, append_event
from enc.launcher.backends.slurm import commands as slurm
from enc.launcher.backends.slurm.script import SCRIPT_FILE, job_script
from enc.launcher.checks.before_launch import check_before
from enc.launcher.machine.rank_environment import blocked_stop_signals
from enc.launcher.planning.cluster_defaults import Say, submitted_config, told, with_cluster_defaults
from enc.launcher.planning.plan import Plan, make_plan, plan_notes
from enc.launcher.planning.resume import set_aside, settled
from enc.launcher.run_folder.lock import RunLock
from enc.launcher.run_folder.records import git_state, move_aside, move_back, write_atomically
from enc.launcher.run_folder.snapshot import snapshot_code


def submit(config: RunConfig, allow_change: bool, prepare: Callable[[RunConfig], Any], say: Say) -> str:
    """Check a run, write its folder and queue its job; return the job's id. Raises UsageError, and nothing is left.

    `prepare(config)` checks the token store where there is one; a missing one is made in the job.
    """
    config = with_cluster_defaults(config, say)
    run_dir = make_plan(config).run_dir
    lock = RunLock(run_dir)
    try:
        config = settled(run_dir, config, allow_change, say)
        plan = make_plan(config)
        if plan.store_ready:
            prepare(config)
        check_before(plan, say)
        for note in plan_notes(plan):
            say(note)
        with blocked_stop_signals():  # a job that is queued needs its files
            job = _queue(plan, lock, say)
    except BaseException:
        lock.release(remove_if_created=True)
        raise
    lock.release()  # the job waits for this
    say(told(plan, job))
    return job


def _queue(plan: Plan, lock: RunLock, say: Say) -> str:
    """Queue the job and write what it starts from.

    When SLURM refuses it, an older run is put back in its place; when its files cannot be written, it is cancelled.
    """
    run_dir, checkpoint = plan.run_dir, plan.config.trainer.resume_from_checkpoint
    moved_to = None if checkpoint else move_aside(run_dir, say)
    try:
        job = _sbatch(plan)
    except BaseException:
        if moved_to:
            move_back(moved_to, run_dir, say)
        raise
    try:
        lock.belongs_to(job)
        if checkpoint:
            set_aside(run_dir, Path(str(checkpoint)), say)
        _write_run(plan, job)
    except BaseException:
        slurm.cancel(job)
        raise
    return job


def _sbatch(plan: Plan) -> str:
    """Hand the script to SLURM, which keeps a copy; the run's own files are written once it was accepted."""
    new = not (plan.run_dir / "logs").exists()
    script = plan.run_dir / f".{SCRIPT_FILE}"
    (plan.run_dir / "logs").mkdir(exist_ok=True)
    try:
        if plan.config.launch.snapshot_code:  # before sbatch: a job that starts at once imports from it
            snapshot_code(plan.run_dir)
        script.write_text(script_of(plan))
        job = slurm.submit(script)
        script.replace(plan.run_dir / SCRIPT_FILE)
        return job
    except BaseException:
        script.unlink(missing_ok=True)
        if new:
            (plan.run_dir / "logs").rmdir()
            shutil.rmtree(plan.run_dir / "code", ignore_errors=True)
        raise


def script_of(plan: Plan) -> str:
    """Return the job script of a plan, for the working folder and Python of this process."""
    return job_script(plan.config, plan.run_dir, Path.cwd(), plan.config.launch.python or sys.executable)


def _write_run(plan: Plan, job: str) -> None:
    """Write the config that the job starts from, and the event."""
    launch = plan.config.launch
    write_atomically(plan.run_dir / "config.yaml", submitted_config(plan).to_yaml())
    append_event(
        plan.run_dir, Event.SUBMITTED, job=job, nodes=launch.num_nodes, nproc_per_node=launch.nproc_per_node,
        script=SCRIPT_FILE, after=launch.slurm.after, command=shlex.join(sys.argv), git=git_state(Path.cwd()),
        user=os.environ.get("USER", ""),
    )  # fmt: skip
