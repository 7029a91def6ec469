"""The training loop.

    [ one training step -> log -> evaluate -> save ] ... -> last evaluation, last checkpoint -> test

The global batch, the masks and the dropout of step s are functions of (config, s), so a run that was stopped and
resumed goes through the same numbers as one that was not. Stop signals are acted on before a step and between
evaluation batches, when all ranks agree; the state is saved first. A checkpoint is written while training goes on.
`enc.encoder.run.start` builds a `Run`.
"""

import math
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from enc.encoder.checkpoints.folder import checkpoints_dir, verify
from enc.encoder.checkpoints.io import Saver, load
from enc.encoder.config.schema import RunConfig
from enc.encoder.data.batches import EvalBatches, Microbatch
from enc.encoder.engine.interface import Engine
from enc.encoder.errors import RunError, Stopped
from enc.encoder.evaluate.mlm import evaluate_mlm
from enc.encoder.events import Event
from enc.encoder.hardware import Hardware
from enc.encoder.heartbeat import Heartbeat, host_name
from enc.encoder.keyed import set_global_seed
from enc.encoder.optim.schedule import make_schedule
from enc.encoder.ranks import Ranks
from enc.encoder.run.build import Data, eval_batches, train_loader
from enc.encoder.run.log import RunLog
from enc.encoder.run.stopwatch import Stopwatch
from enc.encoder.signals import StopFlag
from enc.encoder.sizing.batch_split import BatchSplit
from enc.encoder.sizing.sizes import training_flops

_STRAGGLER_RATIO, _STRAGGLER_S = 1.5, 0.02
_STRAGGLER_LINES, _STRAGGLER_STEPS = 3, 100


@dataclass
class Window:
    """Sums since the last log line; saved with a checkpoint so that a resumed run logs the same averages."""

    loss_sum: float = 0.0
    num_labels: int = 0
    num_correct: int = 0
    logsumexp_sum: float = 0.0


@dataclass
class Best:
    """The best evaluation so far, whose checkpoint is kept."""

    metric: str
    value: float
    step: int

    def beaten_by(self, value: float) -> bool:
        """Tell whether another value is strictly better."""
        return value > self.value if self.metric == "eval_accuracy" else value < self.value


@dataclass
class TrainState:
    """Counters of a run, the same on all ranks. Everything else is a function of the config and `step`."""

    step: int = 0
    tokens: int = 0
    nonfinite_steps: int = 0
    evaluated_step: int = -1
    loss_is_finite: bool = True
    window: Window = field(default_factory=Window)
    best: Best | None = None

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "TrainState":
        known = {name: saved[name] for name in cls.__dataclass_fields__ if name not in ("window", "best")}
        best = Best(**saved["best"]) if saved.get("best") else None  # imported checkpoints have none
        return cls(**known, window=Window(**saved["window"]), best=best)


@dataclass
class StepWork:
    """Work and time since the last log line, for rates; never saved."""

    steps: int = 0
    tokens: int = 0
    flops: int = 0
    seconds: float = 0.0
    save_stall_s: float = 0.0


@dataclass
class Stragglers:
    """Looks for a rank that keeps the others waiting, by the part of a step that a rank does before it waits."""

    last: int = -1
    lines: int = 0
    steps: int = 0

    def note(self, run: "Run", own_s: float) -> None:
        """Compare the ranks' own seconds a step since the last log line; name one that stays far behind. Collective.

        With FSDP the forward pass waits too, so there only slow data is seen.
        """
        if run.ranks.world_size == 1:
            return
        times = run.ranks.gather((own_s, host_name()))
        rank = max(range(len(times)), key=lambda r: times[r][0])
        slowest, host = times[rank]
        ratio = slowest / max(statistics.median(seconds for seconds, _ in times), 1e-9)
        if rank != self.last or ratio < _STRAGGLER_RATIO or slowest < _STRAGGLER_S:
            self.last, self.lines, self.steps = rank, 0, 0
            return
        self.lines, self.steps = self.lines + 1, self.steps + run.work.steps
        if self.lines >= _STRAGGLER_LINES and self.steps >= _STRAGGLER_STEPS:
            self.lines = self.steps = 0
            run.log.event(Event.STRAGGLER, step=run.state.step, rank=rank, host=host, ratio=round(ratio, 2))


@dataclass
class Run:
    """The parts of a run that its functions share."""

    dir: Path
    config: RunConfig
    ranks: Ranks
    hardware: Hardware
    data: Data
    split: BatchSplit
    eval_batches: EvalBatches | None
    engine: Engine
    saver: Saver
    log: RunLog
    stop: StopFlag
    beat: Heartbeat
    state: TrainState
    work: StepWork = field(default_factory=StepWork)
    stragglers: Stragglers = field(default_factory=Stragglers)
    saved_step: int = -1


# --- the loop --------------------------------------------------------------------------------------------------------


def train(run: Run) -> None:
    """Train to `trainer.max_steps`. Raises Stopped after a signal, with the state saved."""
    config, state, engine, ranks = run.config, run.state, run.engine, run.ranks
    schedule = make_schedule(config.scheduler, config.trainer.max_steps)
    watch = Stopwatch(run.hardware.device.type == "cuda", run.beat.mark)
    batches = iter(train_loader(run.data, config, run.split, ranks, watch.cuda, state.step))
    run.log.start()
    _boundary(run, before_first_step=True)
    while state.step < config.trainer.max_steps:
        began = time.perf_counter()
        # ---- one training step --------------------------------------------------------------------------------------
        with watch("data_wait", on_device=False):
            microbatches = [next(batches) for _ in range(run.split.accumulation)]
        run.beat.mark("agree")  # here a rank that is ready waits for those that are not
        stopping, num_labels, *sizes = ranks.sum(bool(run.stop) or run.saver.failed, *_sizes(microbatches))
        if stopping:
            _save_and_stop(run)
        sums = (0.0, 0, 0.0)
        for index, microbatch in enumerate(microbatches):
            last = index == len(microbatches) - 1
            set_global_seed(config.seed, "dropout", state.step, index, ranks.rank)
            with watch("forward"):
                output = engine.forward(microbatch.to(run.hardware.device), last)
            with watch("backward"):
                engine.backward(output.loss_sum / num_labels, last)
            sums = tuple(total + part.detach().double() for total, part in zip(sums, output, strict=True))
        learning_rate = config.optimizer.lr * schedule(state.step)
        with watch("optimizer"):
            grad_norm = engine.step(learning_rate)
        state.step += 1
        # -------------------------------------------------------------------------------------------------------------
        _account(run, ranks.sum(*sums), int(num_labels), sizes, grad_norm)
        run.work.seconds += time.perf_counter() - began
        run.beat.step, run.beat.step_s = state.step, run.work.seconds / run.work.steps
        run.log.advance(state.step)
        if state.step % config.trainer.logging_steps == 0 or state.step == config.trainer.max_steps:
            _log_step(run, watch, learning_rate, grad_norm, int(num_labels))
        _boundary(run)
    _note_saved(run, wait=True)
    _test(run)


def _sizes(microbatches: list[Microbatch]) -> list[int]:
    """Return (labels, tokens, rows, keys, pairs of both) of this rank's part of a step."""
    sizes = [
        (m.num_labels, m.num_tokens, m.input_ids.numel(), int(m.cu_seqlens[-1]), m.num_pairs) for m in microbatches
    ]
    return [sum(column) for column in zip(*sizes, strict=True)]


def _account(run: Run, sums: list[float], num_labels: int, sizes: list[float], grad_norm: float) -> None:
    """Add a finished step to the counters; a step whose gradient was not finite changed no weight."""
    work, state, (loss_sum, num_correct, logsumexp_sum) = run.work, run.state, sums
    tokens, states, keys, pairs = map(int, sizes)
    state.tokens += tokens
    work.steps += 1
    work.tokens += tokens
    whole_last_layer = not run.config.trainer.last_layer_of_labels_only
    work.flops += training_flops(run.config.model, states, keys, pairs, num_labels, whole_last_layer)
    state.loss_is_finite = math.isfinite(grad_norm) and math.isfinite(loss_sum)
    if state.loss_is_finite:
        window = state.window
        window.loss_sum += loss_sum
        window.num_labels += num_labels
        window.num_correct += int(num_correct)
        window.logsumexp_sum += logsumexp_sum
        return
    state.nonfinite_steps += 1
    run.log.event(Event.SKIPPED_STEP, step=state.step, loss=_text(loss_sum / num_labels), grad_norm=_text(grad_norm))
    if state.nonfinite_steps > run.config.trainer.max_nonfinite_steps:
        raise RunError(
            f"{state.nonfinite_steps} steps had a non-finite loss or gradient, the last at step {state.step} (loss "
            f"{loss_sum / num_labels}, gradient norm {grad_norm}); trainer.max_nonfinite_steps allows "
            f"{run.config.trainer.max_nonfinite_steps}. Lower optimizer.lr or set trainer.gradient_clipping, then "
            "resume from a checkpoint before the trouble: `enc ckpt ls` shows them."
        )


def _text(number: float) -> float | str:
    return number if math.isfinite(number) else str(number)


def _boundary(run: Run, before_first_step: bool = False) -> None:
    """Evaluate and save when this step asks for it; at the last step always, and the best so far at once."""
    trainer, state = run.config.trainer, run.state
    _note_saved(run)
    last = state.step == trainer.max_steps
    due = state.step % trainer.eval_steps == 0 if state.step else trainer.eval_on_start
    best = False
    if run.eval_batches is not None and (due or last) and state.evaluated_step != state.step:
        best = _evaluate(run, run.eval_batches)
    due = trainer.save_strategy == "steps" and state.step % trainer.save_steps == 0 and not before_first_step
    # A step that was saved before it was evaluated, on a signal, is saved again when it proves to be the best.
    if best or ((due or last) and run.saved_step != state.step):
        _save(run)


def _evaluate(run: Run, batches: EvalBatches) -> bool:
    """Evaluate, and tell whether this is the best so far."""
    metrics = _metrics(run, batches, "eval", run.config.trainer.eval_max_batches)
    if metrics is None:
        _save_and_stop(run)
    run.state.evaluated_step = run.state.step
    run.log.evaluation({"step": run.state.step, "time": time.time(), **metrics})
    return _note_best(run, metrics)


def _metrics(run: Run, batches: EvalBatches, kind: str, count: int | None = None) -> dict[str, float] | None:
    """Return the metrics of held-out text, their names beginning with `kind`; None after a stop signal."""

    def should_stop() -> bool:
        run.beat.mark("evaluate")
        return bool(run.stop)

    return evaluate_mlm(run.engine.module, batches, run.ranks, run.hardware, count, should_stop, kind)


def _note_best(run: Run, metrics: dict[str, float]) -> bool:
    """Take note of an evaluation that is better than all before by the metric that counts, and tell whether it is.

    All ranks have the same metrics and the same state, so they agree.
    """
    metric, best = run.config.trainer.best_metric, run.state.best
    if metric is None or not (math.isfinite(metrics["eval_loss"]) and math.isfinite(metrics[metric])):
        return False
    if best is not None and best.metric == metric and not best.beaten_by(metrics[metric]):
        return False
    run.state.best = Best(metric, metrics[metric], run.state.step)
    run.log.event(Event.BEST, step=run.state.step, **{metric: metrics[metric]})
    return True


def _test(run: Run) -> None:
    """Evaluate the best checkpoint, or else the last weights, on the text of the test; once, as the metrics tell.

    The last checkpoint is on disk, and nothing is saved after this: the engine may hold other weights now.
    """
    batches, step = eval_batches(run.data, run.config, "test"), run.state.step
    if batches is None or run.ranks.from_main(run.log.has(step, "test_loss")):
        return
    tested = _load_best(run)
    run.log.say(f"Testing {'the last weights' if tested == step else 'the best checkpoint'}, step {tested}.")
    metrics = _metrics(run, batches, "test")
    if metrics is None:
        _stop(run, _note_signal(run))
    run.log.evaluation({"step": step, "time": time.time(), "test_step": tested, **metrics}, "test")
    run.log.event(Event.TESTED, step=step, test_step=tested, test_loss=_text(metrics["test_loss"]))


def _load_best(run: Run) -> int:
    """Load the best checkpoint of the run, if it has one; return the step whose weights the engine now has."""
    best, step = run.state.best, run.state.step
    if best is None or best.step == step or best.metric != run.config.trainer.best_metric:
        return step
    folder = checkpoints_dir(run.dir) / str(best.step)
    run.beat.mark("restore")
    status = run.ranks.from_main(verify(folder) if run.ranks.is_main else None)
    if status.state != "complete":
        run.log.say(f"The best checkpoint, {folder}, is {status.state}: {status.problems[0]}.")
        return step
    load(folder, run.engine)
    return best.step


def _log_step(run: Run, watch: Stopwatch, learning_rate: float, grad_norm: float, num_labels: int) -> None:
    state, window, work, trainer = run.state, run.state.window, run.work, run.config.trainer
    parts = watch.read()
    run.stragglers.note(run, (parts.get("data_wait", 0.0) + parts.get("forward", 0.0)) / work.steps)
    places = work.steps * run.split.rows_per_step * run.config.row_length
    loss = window.loss_sum / window.num_labels if window.num_labels else math.nan
    record = {
        "step": state.step,
        "time": time.time(),
        "loss": loss,
        "loss_bits": loss / math.log(2),
        "logsumexp": window.logsumexp_sum / window.num_labels if window.num_labels else math.nan,
        "grad_norm": grad_norm,
        "learning_rate": learning_rate,
        "num_labels": num_labels,
        "tokens": state.tokens,
        "tokens_per_s": work.tokens / work.seconds,
        "mfu": work.flops / (work.seconds * run.hardware.peak_flops * run.ranks.world_size),
        "fill": work.tokens / places,
        **{
            f"{part}_s": parts.get(part, 0.0) / work.steps for part in ("data_wait", "forward", "backward", "optimizer")
        },
        "step_s": work.seconds / work.steps,
        "save_stall_s": work.save_stall_s,
        "max_memory_mb": run.hardware.max_memory_mb(),
        "nonfinite_steps": state.nonfinite_steps,
    }
    if trainer.log_train_accuracy:
        record["accuracy"] = window.num_correct / max(window.num_labels, 1)
    if trainer.log_weight_norms:
        record["weight_norm"] = run.engine.weight_norm()
    state.window, run.work = Window(), StepWork()
    run.log.train(record)


# --- saving and stopping ---------------------------------------------------------------------------------------------


def _save(run: Run) -> None:
    """Start to save the state of the last finished step, once the save before is on disk."""
    began, step = time.perf_counter(), run.state.step
    run.beat.mark("save")
    _note_saved(run, wait=True)
    counters = asdict(run.state) | {"data_fingerprint": run.data.fingerprint, "world_size": run.ranks.world_size}
    run.saver.save(step, run.engine, counters)
    run.saved_step = step
    run.work.save_stall_s += time.perf_counter() - began


def _note_saved(run: Run, wait: bool = False) -> None:
    """Tell of a save that has ended. With `wait`, on all ranks, also of one under way, or raise what went wrong."""
    began = time.perf_counter()
    ended = run.saver.finished and not run.saver.failed
    saved = run.saver.wait() if wait or ended else None
    if saved is None:
        return
    stall_s = saved.stall_s + time.perf_counter() - began
    run.beat.took(saved.seconds)
    run.log.event(
        Event.SAVED, step=saved.step, path=str(saved.folder), seconds=round(saved.seconds, 3),
        stall_seconds=round(stall_s, 3), deleted=[p.name for p in saved.deleted],
    )  # fmt: skip
    run.log.say(
        f"step {saved.step:>7}  saved checkpoints/{saved.step} in {saved.seconds:.1f} s, of which training waited "
        f"{stall_s:.1f} s"
    )


def _save_and_stop(run: Run) -> NoReturn:
    """Save the state of the last finished step and raise Stopped on every rank."""
    run.beat.mark("save")
    _note_saved(run, wait=True)
    name = _note_signal(run)
    if run.saved_step != run.state.step:
        _save(run)
        _note_saved(run, wait=True)
    _stop(run, name)


def _note_signal(run: Run) -> str:
    """Record the signal that stops the run and return its name."""
    name = run.ranks.from_main(run.stop.signal_name) or run.stop.signal_name or "a signal on another rank"
    run.log.event(Event.SIGNAL, signal=name, step=run.state.step)
    return name


def _stop(run: Run, name: str) -> NoReturn:
    raise Stopped(
        f"Stopped by {name} at step {run.state.step}; its checkpoint is saved. Go on with `enc resume latest`."
    )
