"""The training loop.

    [ one training step -> log -> evaluate -> save ] ... -> last evaluation, last checkpoint -> test

The global batch, its draws and the dropout of step s are functions of (config, s), so a run that was stopped and
resumed goes through the same numbers as one that was not. Stop signals are acted on before a step and between
evaluation batches, when all ranks agree; the state is saved first. A checkpoint is written while training goes on.

`enc.encoder.run.start` builds a `Run`. What it trains, on what and by which measure is its `Task`.
"""

import time
from collections.abc import Sequence
from typing import NamedTuple

from enc.encoder.data.interface import Batch, StepSizes, total
from enc.encoder.optim.schedule import make_schedule
from enc.encoder.run.account import account, log_steps
from enc.encoder.run.held_out import evaluate, test
from enc.encoder.run.parts import Run
from enc.encoder.run.passes import EnginePasses
from enc.encoder.run.saving import note_saved, save, save_and_stop
from enc.encoder.run.stopwatch import Stopwatch


def train(run: Run) -> None:
    """Train to `trainer.max_steps`. Raises Stopped after a signal, with the state saved."""
    config, task, state, engine, reporter = run.config, run.task, run.state, run.engine, run.reporter
    schedule = make_schedule(config.scheduler, config.trainer.max_steps)
    device = run.place.hardware.device
    watch = Stopwatch(device.type == "cuda", reporter.heartbeat.mark)
    passes = EnginePasses(engine, device, watch, config.seed, run.place.ranks.rank)
    steps = task.data.steps(task.share, state.step, state.cursor, lambda: bool(run.place.stop))
    reporter.log.start()
    _boundary(run, before_first_step=True)
    while state.step < config.trainer.max_steps:
        began = time.perf_counter()
        # ---- one training step --------------------------------------------------------------------------------------
        with watch("data_wait", on_device=False):
            microbatches = next(steps)
        agreed = _agree(run, microbatches)
        if agreed.stop:
            save_and_stop(run)
        sums = task.objective.accumulate(passes.at(state.step), microbatches, agreed.sizes.size)
        learning_rate = config.optimizer.lr * schedule(state.step)
        with watch("optimizer"):
            grad_norm = engine.step(learning_rate)
        state.step += 1
        # -------------------------------------------------------------------------------------------------------------
        account(run, sums, agreed.sizes, grad_norm)
        reporter.step_done(state.step, time.perf_counter() - began)
        if state.step % config.trainer.logging_steps == 0 or state.step == config.trainer.max_steps:
            log_steps(run, watch, learning_rate, grad_norm, agreed.sizes.size)
        _boundary(run)
    note_saved(run, wait=True)
    test(run)


class Agreed(NamedTuple):
    """What all ranks know before the first backward pass of a step."""

    stop: bool  # a rank got a signal, or could not write its part of a checkpoint
    sizes: StepSizes  # of the global batch


def _agree(run: Run, microbatches: Sequence[Batch]) -> Agreed:
    """Tell the other ranks what this one has and whether it must stop, in one reduction. Collective."""
    run.reporter.heartbeat.mark("agree")  # here a rank that is ready waits for those that are not
    must_stop = bool(run.place.stop) or run.saver.failed
    own = total([microbatch.sizes for microbatch in microbatches])
    num_stopping, *sizes = map(int, run.place.ranks.sum(must_stop, *own))
    return Agreed(num_stopping > 0, StepSizes(*sizes))


def _boundary(run: Run, before_first_step: bool = False) -> None:
    """Evaluate and save when this step asks for it; at the last step always, and the best so far at once."""
    trainer, state, evaluation = run.config.trainer, run.state, run.task.evaluations.get("eval")
    note_saved(run)
    is_last = state.step == trainer.max_steps
    asks_to_evaluate = state.step % trainer.eval_steps == 0 if state.step else trainer.eval_on_start
    asks_to_save = trainer.save_strategy == "steps" and state.step % trainer.save_steps == 0 and not before_first_step
    is_best = False
    if evaluation is not None and (asks_to_evaluate or is_last) and state.evaluated_step != state.step:
        is_best = evaluate(run, evaluation)
    # A step that was saved before it was evaluated, on a signal, is saved again when it proves to be the best.
    if is_best or ((asks_to_save or is_last) and run.saved_step != state.step):
        save(run)
