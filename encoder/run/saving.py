"""Checkpoints of a run, and how it stops: the state of the last finished step is saved first."""

import time
from typing import NoReturn

from enc.encoder.errors import Stopped
from enc.encoder.events import Event
from enc.encoder.run.parts import Run
from enc.encoder.run.state import trainer_state


def save(run: Run) -> None:
    """Start to save the state of the last finished step, once the save before is on disk."""
    began, step = time.perf_counter(), run.state.step
    run.reporter.heartbeat.mark("save")
    note_saved(run, wait=True)
    data = run.task.data
    run.state.cursor = data.cursor(step)
    run.saver.save(step, run.engine, trainer_state(run.state, data.fingerprint, run.place.ranks.world_size))
    run.saved_step = step
    run.reporter.work.save_stall_s += time.perf_counter() - began


def note_saved(run: Run, wait: bool = False) -> None:
    """Tell of a save that has ended. With `wait`, on all ranks, also of one under way, or raise what went wrong."""
    began = time.perf_counter()
    ended = run.saver.finished and not run.saver.failed
    saved = run.saver.wait() if wait or ended else None
    if saved is None:
        return
    stall_s = saved.stall_s + time.perf_counter() - began
    run.reporter.heartbeat.took(saved.seconds)
    run.reporter.log.event(
        Event.SAVED, step=saved.step, path=str(saved.folder), seconds=round(saved.seconds, 3),
        stall_seconds=round(stall_s, 3), deleted=[p.name for p in saved.deleted],
    )  # fmt: skip
    run.reporter.log.say(
        f"step {saved.step:>7}  saved checkpoints/{saved.step} in {saved.seconds:.1f} s, of which training waited "
        f"{stall_s:.1f} s"
    )


def save_and_stop(run: Run) -> NoReturn:
    """Save the state of the last finished step and raise Stopped on every rank.

    When a save has failed, on this rank or another, waiting for it raises its RunError on every rank instead.
    """
    run.reporter.heartbeat.mark("save")
    note_saved(run, wait=True)
    name = note_signal(run)
    if run.saved_step != run.state.step:
        save(run)
        note_saved(run, wait=True)
    stop(run, name)


def note_signal(run: Run) -> str:
    """Record the signal that stops the run and return its name."""
    told = run.place.stop.signal_name
    name = run.place.ranks.from_main(told) or told or "a signal on another rank"
    run.reporter.log.event(Event.SIGNAL, signal=name, step=run.state.step)
    return name


def stop(run: Run, name: str) -> NoReturn:
    """Raise Stopped; a checkpoint of the last finished step is on disk."""
    raise Stopped(
        f"Stopped by {name} at step {run.state.step}; its checkpoint is saved. Go on with `enc resume latest`."
    )
