"""What a run will do that its author may not mean: nothing of it is an error. Pure."""

from collections.abc import Iterator

from enc.encoder.optim.schedule import make_schedule, phases
from enc.launcher.planning.plan import Plan


def advice(plan: Plan) -> Iterator[str]:
    """Yield a sentence for each setting that may spoil a run without a word, and what to set."""
    yield from _on_schedule(plan)
    yield from _on_evaluation(plan)
    config = plan.config
    if not config.datacollator.pack_sequences:
        yield (
            f"datacollator.pack_sequences is false: each document takes a row of its own, of up to {config.row_length} "
            "tokens; true fills rows with several."
        )
    if config.trainer.gradient_clipping is None:
        yield "Gradients are not clipped: trainer.gradient_clipping 1.0 is usual, 0 says that it is meant."


def _on_schedule(plan: Plan) -> Iterator[str]:
    scheduler, steps = plan.config.scheduler, plan.config.trainer.max_steps
    warmup, _, decay_end = phases(scheduler, steps)
    multiplier = make_schedule(scheduler, steps)
    if warmup >= steps:
        yield (
            f"The warm-up of {warmup:,} steps is not shorter than the run of {steps:,}: the learning rate ends at "
            f"{multiplier(steps - 1):.1%} of optimizer.lr. scheduler.warmup_percent 10 fits any length."
        )
    elif decay_end < steps and multiplier(steps - 1) == 0:
        yield (
            f"The learning rate is 0 from step {decay_end:,} on, and the run has {steps:,}: the rest learns nothing. "
            "Lower trainer.max_steps, or set scheduler.total_steps or scheduler.final_lr_ratio."
        )


def _on_evaluation(plan: Plan) -> Iterator[str]:
    if plan.config.trainer.eval_strategy != "no" and not plan.evaluates:
        yield (
            "Nothing will be evaluated: no text is held out. dataset.validation_split 0.01 holds some out when the "
            "token store is made; trainer.eval_strategy no says that it is meant."
        )
