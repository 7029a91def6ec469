"""Evaluations of a run, which of them was the best, and the test at its end."""

import itertools
import math
import time

from enc.encoder.checkpoints.folder import checkpoints_dir, verify
from enc.encoder.checkpoints.io import load
from enc.encoder.evaluate.interface import Evaluation
from enc.encoder.events import Event
from enc.encoder.run.account import json_number
from enc.encoder.run.parts import Run
from enc.encoder.run.saving import note_signal, save_and_stop, stop
from enc.encoder.run.state import Best


def evaluate(run: Run, evaluation: Evaluation) -> bool:
    """Evaluate, and tell whether this is the best so far. Raises Stopped after a signal, with the state saved."""
    metrics = _metrics(run, evaluation)
    if metrics is None:
        save_and_stop(run)
    run.state.evaluated_step = run.state.step
    run.reporter.log.evaluation({"step": run.state.step, "time": time.time(), **metrics})
    return _note_best(run, metrics)


def _metrics(run: Run, evaluation: Evaluation) -> dict[str, float] | None:
    """Return the metrics of held-out data; None after a stop signal."""

    rounds = itertools.count()

    def should_stop() -> bool:
        run.reporter.heartbeat.mark("evaluate")
        run.reporter.log.evaluating(next(rounds) * run.place.ranks.world_size, evaluation.num_batches)
        return bool(run.place.stop)

    return evaluation(run.engine.module, run.place.ranks, run.place.hardware, should_stop)


def _note_best(run: Run, metrics: dict[str, float]) -> bool:
    """Take note of an evaluation that is better than all before by the metric that counts, and tell whether it is.

    All ranks have the same metrics and the same state, so they agree.
    """
    name, best = run.config.trainer.best_metric, run.state.best
    if name is None or not (math.isfinite(metrics["eval_loss"]) and math.isfinite(metrics[name])):
        return False
    if best is not None and best.metric == name:
        greater = run.task.record.eval_metrics[name].greater_is_better
        if not (metrics[name] > best.value if greater else metrics[name] < best.value):
            return False
    run.state.best = Best(name, metrics[name], run.state.step)
    run.reporter.log.event(Event.BEST, step=run.state.step, **{name: metrics[name]})
    return True


def test(run: Run) -> None:
    """Evaluate the best checkpoint, or else the last weights, on the data of the test; once, as the metrics tell.

    The last checkpoint is on disk, and nothing is saved after this: the engine may hold other weights now.
    """
    evaluation, step, log = run.task.evaluations.get("test"), run.state.step, run.reporter.log
    if evaluation is None or run.place.ranks.from_main(log.has(step, "test_loss")):
        return
    tested = _load_best(run)
    log.say(f"Testing {'the last weights' if tested == step else 'the best checkpoint'}, step {tested}.")
    metrics = _metrics(run, evaluation)
    if metrics is None:
        stop(run, note_signal(run))
    log.evaluation({"step": step, "time": time.time(), "test_step": tested, **metrics}, "test")
    log.event(Event.TESTED, step=step, test_step=tested, test_loss=json_number(metrics["test_loss"]))


def _load_best(run: Run) -> int:
    """Load the best checkpoint of the run, if it has one; return the step whose weights the engine now has."""
    best, step, ranks = run.state.best, run.state.step, run.place.ranks
    if best is None or best.step == step or best.metric != run.config.trainer.best_metric:
        return step
    folder = checkpoints_dir(run.dir) / str(best.step)
    run.reporter.heartbeat.mark("restore")
    status = ranks.from_main(verify(folder) if ranks.is_main else None)
    if status.state != "complete":
        run.reporter.log.say(f"The best checkpoint, {folder}, is {status.state}: {status.problems[0]}.")
        return step
    load(folder, run.engine)
    return best.step
