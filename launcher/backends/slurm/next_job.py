"""The next job of a run: requeued, submitted from inside the one that ends, or the next task of an array."""

import os
from pathlib import Path

from enc.encoder.config.launch import SlurmConfig
from enc.encoder.config.load import load_run
from enc.encoder.errors import UsageError
from enc.encoder.events import Event, append_event
from enc.launcher.backends.slurm import commands as slurm
from enc.launcher.backends.slurm.script import SCRIPT_FILE
from enc.launcher.run_folder.events import read_events, since_submitted


def kind(settings: SlurmConfig, must_be_new: bool) -> str:
    """Return how the next job is had, as a decision's name.

    Nodes can only be excluded by a new job: it must be one when a node was excluded just now.
    """
    if must_be_new or settings.continue_by == "resubmit":
        return "resubmit"
    return {"requeue": "requeue", "array": "next_task"}[settings.continue_by]


def request(run_dir: Path, job: str, must_be_new: bool = False) -> str:
    """Ask for the job that goes on with a run, as its config says, and return how.

    A requeued job starts again itself, and this one ends at once. Raises UsageError when SLURM refuses.
    """
    settings = load_run(run_dir).launch.slurm
    how = kind(settings, must_be_new)
    if how == "next_task":
        if os.environ.get("SLURM_ARRAY_TASK_ID") == os.environ.get("SLURM_ARRAY_TASK_MAX"):
            raise UsageError("this was the last task of the array (launch.slurm.array_size)")
    elif how == "requeue":
        slurm.patiently(lambda: slurm.requeue(job))
    else:
        _submit_next(run_dir, job, [*settings.exclude, *excluded_nodes(run_dir)])
    return how


def _submit_next(run_dir: Path, job: str, exclude: list[str]) -> None:
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    options = [f"--dependency=afterany:{job}"] + ([f"--exclude={','.join(exclude)}"] if exclude else [])
    new = slurm.patiently(lambda: slurm.submit(run_dir / SCRIPT_FILE, *options))
    append_event(run_dir, Event.CONTINUED, job=new, after=job)
    if array is not None:
        slurm.cancel("--state=PENDING", array)


def drop_rest_of_array() -> None:
    """Cancel the tasks of an array that have not started: the run does not need them."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    if array is not None:
        slurm.cancel("--state=PENDING", array)


def excluded_nodes(run_dir: Path) -> list[str]:
    """Return the nodes that a run has excluded by itself since a person last asked for it."""
    return [event["node"] for event in since_submitted(run_dir) if event["event"] == Event.NODE_EXCLUDED]


def after_lost_supervisor(run_dir: Path, job: str) -> None:
    """Ask for the next job in the place of a supervisor that was killed; an operator's cancel is left alone."""
    events = read_events(run_dir)
    since = next((i for i in range(len(events) - 1, -1, -1) if events[i]["event"] == Event.ATTEMPT), 0)
    if any(event["event"] == Event.CANCELLED for event in events[since:]):
        return
    append_event(run_dir, Event.SUPERVISOR_LOST, job=job, detail="The batch process was killed; its ranks end too.")
    request(run_dir, job)
