"""What is counted of a step, and the record that is logged of several."""

import math
import time

from torch import Tensor

from enc.encoder.data.interface import StepSizes
from enc.encoder.errors import RunError
from enc.encoder.events import Event
from enc.encoder.run.parts import Place, Run
from enc.encoder.run.reporter import StepWork
from enc.encoder.run.stopwatch import Stopwatch

PARTS = ("data_wait", "forward", "backward", "optimizer")


def account(run: Run, own_sums: dict[str, Tensor], sizes: StepSizes, grad_norm: float) -> None:
    """Add a finished step to the counters; a step whose gradient was not finite changed no weight. Collective."""
    state = run.state
    sums = dict(zip(own_sums, run.place.ranks.sum(*map(float, own_sums.values())), strict=True))
    state.tokens += sizes.tokens
    run.reporter.work.add(sizes, run.task.flops(sizes))
    state.loss_is_finite = math.isfinite(grad_norm) and math.isfinite(sums["loss_sum"])
    if state.loss_is_finite:
        for name, value in {run.task.record.size: sizes.size, **sums}.items():
            state.window[name] += int(value) if name.startswith("num_") else value
    else:
        _note_skipped(run, sums["loss_sum"] / sizes.size, grad_norm)


def _note_skipped(run: Run, loss: float, grad_norm: float) -> None:
    """Record a step that changed nothing; raise RunError when there were too many."""
    state, limit = run.state, run.config.trainer.max_nonfinite_steps
    state.nonfinite_steps += 1
    run.reporter.log.event(
        Event.SKIPPED_STEP, step=state.step, loss=json_number(loss), grad_norm=json_number(grad_norm)
    )
    if state.nonfinite_steps > limit:
        raise RunError(
            f"{state.nonfinite_steps} steps had a non-finite loss or gradient, the last at step {state.step} (loss "
            f"{loss}, gradient norm {grad_norm}); trainer.max_nonfinite_steps allows {limit}. Lower optimizer.lr or "
            "set trainer.gradient_clipping, then resume from a checkpoint before the trouble: `enc ckpt ls` shows them."
        )


def json_number(number: float) -> float | str:
    """Return a number as an event holds it: JSON has no NaN."""
    return number if math.isfinite(number) else str(number)


def _mfu(work: StepWork, place: Place) -> float | None:
    peak = place.hardware.peak_flops
    return work.flops / (work.seconds * peak * place.ranks.world_size) if peak else None


def log_steps(run: Run, watch: Stopwatch, learning_rate: float, grad_norm: float, size: int) -> None:
    """Log the steps since the last record, and begin to count anew. `size` is that of the last step. Collective."""
    state, work, reporter, ranks = run.state, run.reporter.work, run.reporter, run.place.ranks
    step_parts = {part: seconds / work.steps for part, seconds in watch.read().items()}
    own_s = step_parts.get("data_wait", 0.0) + step_parts.get("forward", 0.0)
    if straggler := reporter.stragglers.find(ranks, own_s, work.steps):
        reporter.log.event(Event.STRAGGLER, step=state.step, **straggler)
    metrics = run.task.train_metrics(state.window)
    record = {
        "step": state.step,
        "time": time.time(),
        **metrics.always,
        "grad_norm": grad_norm,
        "learning_rate": learning_rate,
        run.task.record.size: size,
        "tokens": state.tokens,
        "tokens_per_s": work.tokens / work.seconds,
        "mfu": _mfu(work, run.place),
        "fill": work.tokens / (work.steps * run.task.data.places_per_step(run.task.share)),
        **{f"{part}_s": step_parts.get(part, 0.0) for part in PARTS},
        "step_s": work.seconds / work.steps,
        "save_stall_s": work.save_stall_s,
        "max_memory_mb": run.place.hardware.max_memory_mb(),
        "nonfinite_steps": state.nonfinite_steps,
        **metrics.asked,
    }
    if run.config.trainer.log_weight_norms:
        record["weight_norm"] = run.engine.weight_norm()
    state.window, reporter.work = run.task.record.empty_sums(), StepWork()
    reporter.log.train(record)
