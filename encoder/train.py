"""The training process: reads `config.yaml` of its run folder, nothing else.

    build -> restore -> [ one training step -> log -> evaluate -> save ] ... -> last evaluation, last checkpoint

The global batch, the masks and the dropout of step s are functions of (config, s), so a run that was stopped and resumed
goes through the same numbers as one that was not. Stop signals are acted on before a step and between evaluation
batches, when all ranks agree; the state is saved first.
"""

import math
import os
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch

from enc.encoder import checkpoint, checkpoint_io
from enc.encoder.batch_split import BatchSplit, split_batch
from enc.encoder.build import Data, build_engine, build_model, eval_batches, num_workers, open_data, train_loader
from enc.encoder.config import RunConfig
from enc.encoder.config_load import load_text
from enc.encoder.data.batches import EvalBatches, Microbatch
from enc.encoder.engine.interface import Engine
from enc.encoder.errors import EncError, RunError, Stopped
from enc.encoder.evaluate.mlm import evaluate_mlm
from enc.encoder.faults import StopFlag, die_with_parent
from enc.encoder.hardware import Hardware
from enc.encoder.keyed import set_global_seed
from enc.encoder.metrics import RunLog, Stopwatch, table
from enc.encoder.objectives.mlm import MlmObjective
from enc.encoder.optim.schedule import make_schedule
from enc.encoder.ranks import Ranks
from enc.encoder.sizes import num_parameters, training_flops
from enc.kernels import varlen_attention


@dataclass
class Window:
    """Sums since the last log line; saved with a checkpoint so that a resumed run logs the same averages."""

    loss_sum: float = 0.0
    num_labels: int = 0
    num_correct: int = 0


@dataclass
class TrainState:
    """Counters of a run, the same on all ranks. Everything else is a function of the config and `step`."""

    step: int = 0
    tokens: int = 0
    nonfinite_steps: int = 0
    evaluated_step: int = -1
    loss_is_finite: bool = True
    window: Window = field(default_factory=Window)

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "TrainState":
        known = {name: saved[name] for name in cls.__dataclass_fields__ if name != "window"}
        return cls(**known, window=Window(**saved["window"]))


@dataclass
class StepWork:
    """Work and time since the last log line, for rates; never saved."""

    steps: int = 0
    tokens: int = 0
    flops: int = 0
    seconds: float = 0.0


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
    objective: MlmObjective
    engine: Engine
    log: RunLog
    stop: StopFlag
    state: TrainState
    saved_step: int = -1


# --- the loop --------------------------------------------------------------------------------------------------------


def train(run: Run) -> None:
    """Train to `trainer.max_steps`. Raises Stopped after a signal, with the state saved."""
    config, state, engine, ranks = run.config, run.state, run.engine, run.ranks
    schedule = make_schedule(config.scheduler, config.trainer.max_steps)
    watch, work = Stopwatch(run.hardware.device.type == "cuda"), StepWork()
    batches = iter(train_loader(run.data, config, run.split, ranks, watch.cuda, state.step))
    run.log.start()
    _boundary(run, watch, work, before_first_step=True)
    while state.step < config.trainer.max_steps:
        began = time.perf_counter()
        # ---- one training step --------------------------------------------------------------------------------------
        with watch("data_wait", on_device=False):
            microbatches = [next(batches) for _ in range(run.split.accumulation)]
        stopping, num_labels, *sizes = ranks.sum(bool(run.stop), *_sizes(microbatches))
        if stopping:
            _save_and_stop(run)
        loss_sum = num_correct = 0.0
        for index, microbatch in enumerate(microbatches):
            last = index == len(microbatches) - 1
            set_global_seed(config.seed, "dropout", state.step, index, ranks.rank)
            with watch("forward"), run.hardware.autocast():
                output = engine.forward(microbatch.to(run.hardware.device), last)
            with watch("backward"):
                engine.backward(output.loss_sum / num_labels, last)
            loss_sum, num_correct = loss_sum + output.loss_sum.detach().double(), num_correct + output.num_correct
        learning_rate = config.optimizer.lr * schedule(state.step)
        with watch("optimizer"):
            grad_norm = engine.step(learning_rate)
        state.step += 1
        # -------------------------------------------------------------------------------------------------------------
        _account(run, work, ranks.sum(loss_sum, num_correct), int(num_labels), sizes, grad_norm)
        work.seconds += time.perf_counter() - began
        run.log.advance(state.step)
        if state.step % config.trainer.logging_steps == 0 or state.step == config.trainer.max_steps:
            _log_step(run, watch, work, learning_rate, grad_norm, int(num_labels))
            work = StepWork()
        _boundary(run, watch, work)


def _sizes(microbatches: list[Microbatch]) -> tuple[float, float, float]:
    """Return (labels, tokens, sum of squared document lengths) of this rank's part of a step."""
    squares = sum(float(m.cu_seqlens.diff().double().square().sum()) for m in microbatches)
    return sum(m.num_labels for m in microbatches), sum(m.num_tokens for m in microbatches), squares


def _account(
    run: Run, work: StepWork, sums: list[float], num_labels: int, sizes: list[float], grad_norm: float
) -> None:
    """Add a finished step to the counters; a step whose gradient was not finite changed no weight."""
    state, (loss_sum, num_correct), (tokens, squares) = run.state, sums, sizes
    state.tokens += int(tokens)
    work.steps += 1
    work.tokens += int(tokens)
    work.flops += training_flops(run.config.model, int(tokens), int(squares), num_labels)
    state.loss_is_finite = math.isfinite(grad_norm) and math.isfinite(loss_sum)
    if state.loss_is_finite:
        window = state.window
        window.loss_sum += loss_sum
        window.num_labels += num_labels
        window.num_correct += int(num_correct)
        return
    state.nonfinite_steps += 1
    run.log.event("skipped_step", step=state.step, loss=_text(loss_sum / num_labels), grad_norm=_text(grad_norm))
    if state.nonfinite_steps > run.config.trainer.max_nonfinite_steps:
        raise RunError(
            f"{state.nonfinite_steps} steps had a non-finite loss or gradient, the last at step {state.step} (loss "
            f"{loss_sum / num_labels}, gradient norm {grad_norm}); trainer.max_nonfinite_steps allows "
            f"{run.config.trainer.max_nonfinite_steps}. Lower optimizer.lr or set trainer.gradient_clipping, then resume "
            "from a checkpoint before the trouble: `enc ckpt ls` shows them."
        )


def _text(number: float) -> float | str:
    return number if math.isfinite(number) else str(number)


def _boundary(run: Run, watch: Stopwatch, work: StepWork, before_first_step: bool = False) -> None:
    """Evaluate and save when this step asks for it; at the last step always."""
    trainer, state = run.config.trainer, run.state
    last = state.step == trainer.max_steps
    due = state.step % trainer.eval_steps == 0 and state.step > 0
    if run.eval_batches is not None and state.evaluated_step != state.step:
        if due or last or (state.step == 0 and trainer.eval_on_start):
            _evaluate(run)
    due = trainer.save_strategy == "steps" and state.step % trainer.save_steps == 0 and not before_first_step
    if (due or last) and run.saved_step != state.step:
        _save(run)
    watch.read()


def _evaluate(run: Run) -> None:
    metrics = evaluate_mlm(
        run.objective, run.eval_batches, run.ranks, run.hardware, run.config.trainer.eval_max_batches,
        should_stop=lambda: bool(run.stop),
    )  # fmt: skip
    if metrics is None:
        _save_and_stop(run)
    run.state.evaluated_step = run.state.step
    run.log.evaluation({"step": run.state.step, "time": time.time(), **metrics})


def _log_step(
    run: Run, watch: Stopwatch, work: StepWork, learning_rate: float, grad_norm: float, num_labels: int
) -> None:
    state, window, trainer = run.state, run.state.window, run.config.trainer
    parts = watch.read()
    places = work.steps * run.split.rows_per_step * run.config.row_length
    record = {
        "step": state.step,
        "time": time.time(),
        "loss": window.loss_sum / window.num_labels if window.num_labels else math.nan,
        "grad_norm": grad_norm,
        "learning_rate": learning_rate,
        "num_labels": num_labels,
        "tokens": state.tokens,
        "tokens_per_s": work.tokens / work.seconds,
        "mfu": work.flops / (work.seconds * run.hardware.peak_flops * run.ranks.world_size),
        "fill": work.tokens / places,
        **{f"{part}_s": parts.get(part, 0.0) / work.steps for part in ("data_wait", "forward", "backward", "optimizer")},
        "step_s": work.seconds / work.steps,
        "max_memory_mb": run.hardware.max_memory_mb(),
        "nonfinite_steps": state.nonfinite_steps,
    }
    if trainer.log_train_accuracy:
        record["accuracy"] = window.num_correct / max(window.num_labels, 1)
    if trainer.log_weight_norms:
        record["weight_norm"] = torch.nn.utils.get_total_norm(list(run.engine.state().weights.values())).item()
    state.window = Window()
    run.log.train(record)


# --- saving and stopping ---------------------------------------------------------------------------------------------


def _save(run: Run) -> None:
    began = time.perf_counter()
    trainer, step = run.config.trainer, run.state.step
    folder = checkpoint_io.save(
        run.dir, step, run.engine,
        {**asdict(run.state), "data_fingerprint": run.data.fingerprint, "world_size": run.ranks.world_size},
        [run.dir / "config.yaml", *run.data.tokenizer_files], run.ranks, trainer.min_free_disk_gb,
    )  # fmt: skip
    deleted = checkpoint.prune(run.dir, trainer.save_total_limit) if run.ranks.is_main else []
    run.saved_step = step
    seconds = time.perf_counter() - began
    run.log.event("saved", step=step, path=str(folder), seconds=round(seconds, 3), deleted=[p.name for p in deleted])
    run.log.say(f"step {step:>7}  saved checkpoints/{step} in {seconds:.1f} s")


def _save_and_stop(run: Run) -> None:
    """Save the state of the last finished step and raise Stopped on every rank."""
    name = run.ranks.from_main(run.stop.signal_name) or run.stop.signal_name or "a signal on another rank"
    run.log.event("signal", signal=name, step=run.state.step)
    if run.saved_step != run.state.step:
        _save(run)
    raise Stopped(f"Stopped by {name} at step {run.state.step}; its checkpoint is saved. Go on with `enc resume latest`.")


# --- building and restoring ------------------------------------------------------------------------------------------


def build(run_dir: Path, ranks: Ranks, config: RunConfig, stop: StopFlag) -> Run:
    """Build every part of a run and restore its checkpoint, if it resumes from one."""
    trainer = config.trainer
    hardware = Hardware.detect(trainer.use_cpu, ranks.local_rank, trainer.mixed_precision == "bf16", trainer.tf32)
    data = open_data(config)
    split = split_batch(config.trainer, ranks.world_size)
    model, objective = build_model(config, data.tokenizer.num_tokens)
    engine = build_engine(config, model, objective, hardware, ranks)
    found = _checkpoint_to_resume(run_dir, config, ranks)
    state = _restore(found, engine, data, ranks) if found else TrainState()
    log = RunLog(run_dir, config, current_attempt(run_dir), ranks.is_main, state.step)
    run = Run(run_dir, config, ranks, hardware, data, split, eval_batches(data, config), objective, engine, log, stop, state)
    if found and found.parent == checkpoint.checkpoints_dir(run_dir):
        run.saved_step = state.step
    return run


def current_attempt(run_dir: Path) -> int:
    """Return the number of the newest launch recorded in a run folder; 1 when there is none."""
    return max((int(p.name) for p in (run_dir / "launches").glob("[0-9]*")), default=1)


def _checkpoint_to_resume(run_dir: Path, config: RunConfig, ranks: Ranks) -> Path | None:
    which = config.trainer.resume_from_checkpoint
    if not which:
        return None
    found, error = None, None
    if ranks.is_main:
        try:
            found, passed_over = checkpoint.find_checkpoint(run_dir, which)
            for status in passed_over:
                print(f"Passed over checkpoint {status.path}: {status.state}, {status.problems[0]}.", file=sys.stderr)
        except EncError as problem:
            error = problem
    ranks.agree(error)
    return ranks.from_main(found)


def _restore(folder: Path, engine: Engine, data: Data, ranks: Ranks) -> TrainState:
    saved = checkpoint_io.load(folder, engine, ranks)
    if saved["data_fingerprint"] != data.fingerprint:
        print(f"The token store differs from the one of {folder}: the run goes on with other data.", file=sys.stderr)
    return TrainState.from_dict(saved)


def _warm_up(run: Run) -> None:
    """Run one microbatch through the engine where its first step would otherwise differ from later ones."""
    with run.hardware.autocast():
        batches = train_loader(run.data, run.config.changed({"dataset.num_workers": 0}), run.split, run.ranks, False, 0)
        run.engine.warm_up(next(iter(batches)).to(run.hardware.device))


def describe(run: Run) -> list[tuple[str, str]]:
    """Return every choice that was resolved at start, with the reason a faster one is off."""
    config, plan, split = run.config, run.data.train.plan, run.split
    device = run.hardware.device.type
    dtype = torch.bfloat16 if run.hardware.bf16 else torch.float32
    why_not = varlen_attention.why_not(device, dtype)
    steps = config.trainer.max_steps
    epochs = steps * split.rows_per_step / plan.num_rows
    return [
        ("run", str(run.dir)),
        ("start", f"step {run.state.step} of {steps}" + (" (resumed)" if run.state.step else "")),
        ("model", f"{config.model.type}, {num_parameters(config.model) / 1e6:.1f} M parameters, "
                  f"{config.model.num_hidden_layers} x {config.model.hidden_size}"),
        ("data", f"{plan.num_rows} rows of {plan.row_length} tokens, fill {plan.fill:.4f}, {epochs:.2f} epochs"),
        ("evaluation", f"{len(run.data.eval)} rows" if run.data.eval else "none: the store has no eval split"
                       if config.trainer.eval_strategy != "no" else "off"),
        ("batch", f"{split.rows_per_step} rows = {split.world_size} ranks x {split.accumulation} microbatches "
                  f"x {split.rows_per_microbatch} rows"),
        ("engine", run.engine.name if split.world_size > 1 else f"{run.engine.name}, one process"),
        ("device", f"{run.hardware.name}, {'bf16 autocast' if run.hardware.bf16 else 'fp32'}"),
        ("attention", f"per document{f'; {why_not}' if why_not else ''}"),
        ("loss", "logits of labelled tokens only" if config.trainer.masked_logits_only_loss else "logits of all tokens"),
        ("compile", config.trainer.torch_compile_backend if config.trainer.torch_compile else "off"),
        ("batch workers", str(num_workers(config, device == "cuda"))),
        ("MFU against", f"{run.hardware.peak_flops / 1e12:.2f} TFLOP/s ({run.hardware.peak_source})"),
    ]  # fmt: skip


# --- the process -----------------------------------------------------------------------------------------------------


def main(run_dir: Path) -> NoReturn:
    """Run the training process of this rank and leave it with exit code 0, 2, 3 or 75."""
    stop = StopFlag()
    stop.install()
    if os.environ.get("ENC_DIE_WITH_PARENT"):
        die_with_parent()
    config = load_text((run_dir / "config.yaml").read_text(), str(run_dir / "config.yaml")).config
    ranks = Ranks.join(use_cuda=not config.trainer.use_cpu and torch.cuda.is_available())
    run: Run | None = None
    code, message = 0, None
    try:
        run = build(run_dir, ranks, config, stop)
        _announce(run)
        _warm_up(run)
        train(run)
        run.log.event("finished", step=run.state.step)
    except Stopped as error:
        code, message = error.exit_code, str(error)
    except EncError as error:
        code, message = error.exit_code, str(error)
        _record_failure(run, message)
    except Exception as error:
        code, message = 3, f"{type(error).__name__}: {error}"
        _record_failure(run, message)
        message += f" The traceback is in {_write_traceback(run_dir, ranks.rank)}."
    if run is not None:
        run.log.close(code)
    if message and (ranks.is_main or code == 3):
        print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    sys.stderr.flush()
    # No teardown: DDP's destructor joins gloo's threads while it holds the interpreter lock that they wait for, and one
    # exit in ten or so hangs. Everything is on disk; batch workers die with their parent.
    os._exit(code)


def _announce(run: Run) -> None:
    lines = describe(run)
    run.log.say(table(lines))
    event = "resumed" if run.state.step else "started"
    run.log.event(event, step=run.state.step, world_size=run.ranks.world_size, **{"choices": dict(lines)})


def _record_failure(run: Run | None, message: str) -> None:
    if run is not None:
        run.log.event("failed", step=run.state.step, error=message)


def _write_traceback(run_dir: Path, rank: int) -> Path:
    path = run_dir / "logs" / f"traceback-rank{rank}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(traceback.format_exc())
    return path


if __name__ == "__main__":
    main(Path(sys.argv[1]))
