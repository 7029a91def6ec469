"""Sending a run to SLURM: checks, files, sbatch. What happens in the job is `supervise`."""

import os
import shlex
import shutil
import sys
from pathlib import Path

from enc.encoder.config.schema import RunConfig
from enc.encoder.printable import Say
from enc.launcher.backends.slurm import commands as slurm
from enc.launcher.backends.slurm.script import SCRIPT_FILE, job_script
from enc.launcher.machine.rank_environment import blocked_stop_signals
from enc.launcher.planning.plan import Plan
from enc.launcher.planning.plan_text import plan_notes
from enc.launcher.planning.render import self_contained
from enc.launcher.planning.resume import set_aside
from enc.launcher.run_folder.events import append_event
from enc.launcher.run_folder.lock import RunLock
from enc.launcher.run_folder.records import git_state, move_aside, move_back, write_atomically
from enc.launcher.run_folder.snapshot import snapshot_code


def submit(plan: Plan, lock: RunLock, say: Say) -> str:
    """Write the folder of a run and queue its job; return the job's id. Raises UsageError, and nothing is left."""
    for note in plan_notes(plan):
        say(note)
    with blocked_stop_signals():  # a job that is queued needs its files
        job = _queue(plan, lock, say)
    lock.release()  # the job waits for this
    say(queued_text(plan, job))
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


def queued_text(plan: Plan, job: str) -> str:
    """Tell what was queued, and how to watch it."""
    nodes, ranks = plan.config.launch.num_nodes, plan.config.launch.nproc_per_node
    return (
        f"Job {job} is queued: {nodes} node{'s' if nodes > 1 else ''} x {ranks} rank{'s' if ranks != 1 else ''}, "
        f"{plan.engine}, in {plan.run_dir}.\nWatch it with `enc status {job}` and `enc logs -f {job}`; "
        f"`enc cancel {job}` ends it."
    )


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
    return job_script(plan.config, plan.run_dir, plan.cwd, plan.config.launch.python or sys.executable)


def _write_run(plan: Plan, job: str) -> None:
    """Write the config that the job starts from, and the event."""
    launch = plan.config.launch
    write_atomically(plan.run_dir / "config.yaml", submitted_config(plan).to_yaml())
    append_event(
        plan.run_dir, "submitted", job=job, nodes=launch.num_nodes, nproc_per_node=launch.nproc_per_node,
        script=SCRIPT_FILE, after=launch.slurm.after, command=shlex.join(sys.argv), git=git_state(Path.cwd()),
        user=os.environ.get("USER", ""),
    )  # fmt: skip
