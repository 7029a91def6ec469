"""The training process: reads `config.yaml` of its run folder, nothing else.

build -> restore -> announce -> train -> leave with an exit code
"""

import os
import sys
import traceback
from pathlib import Path
from typing import NoReturn

import torch

from enc.encoder.checkpoints.folder import checkpoints_dir, find_checkpoint
from enc.encoder.checkpoints.io import Saver, load
from enc.encoder.config.load import load_run
from enc.encoder.config.schema import RunConfig
from enc.encoder.engine.settings import engine_name
from enc.encoder.errors import EncError, RunError, Stopped
from enc.encoder.events import Event
from enc.encoder.hardware import Hardware
from enc.encoder.heartbeat import Heartbeat, host_name, rank_file
from enc.encoder.models import fast_paths, first_weights
from enc.encoder.ranks import Ranks, is_lost_peer
from enc.encoder.run.build import (
    build_engine,
    build_model,
    eval_batches,
    num_workers,
    open_data,
    train_loader,
)
from enc.encoder.run.log import RunLog
from enc.encoder.run.train import Run, TrainState, train
from enc.encoder.signals import StopFlag, die_with_parent
from enc.encoder.sizing.batch_split import split_batch
from enc.encoder.sizing.sizes import num_parameters
from enc.encoder.text_table import table


def build(run_dir: Path, ranks: Ranks, config: RunConfig, stop: StopFlag, beat: Heartbeat) -> Run:
    """Build every part of a run and restore its checkpoint, if it resumes from one."""
    beat.mark("build")
    trainer = config.trainer
    hardware = Hardware.detect(trainer.use_cpu, ranks.local_rank, trainer.mixed_precision == "bf16", trainer.tf32)
    fast_paths.allow_kernels(config.model, hardware.device.type, hardware.dtype)
    data = open_data(config)
    split = split_batch(config.trainer, ranks.world_size)
    model, objective = build_model(config, data.tokenizer.num_tokens)
    if not trainer.resume_from_checkpoint:
        first_weights.load(model, config.model, model.num_tokens)
    engine = build_engine(run_dir, config, model, objective, split, hardware.device)
    first = train_loader(data, config.changed({"dataset.num_workers": 0}), split, ranks, False, 0)
    beat.mark("warm_up")
    engine.warm_up(next(iter(first)).to(hardware.device))
    beat.mark("restore")
    found = _checkpoint_to_resume(run_dir, config, ranks)
    state = TrainState.from_dict(load(found, engine)) if found else TrainState()
    saver = Saver(
        run_dir, ranks, [run_dir / "config.yaml", *data.tokenizer_files], trainer.save_total_limit,
        trainer.min_free_disk_gb,
    )  # fmt: skip
    log = RunLog(run_dir, config, current_attempt(), ranks.is_main, state.step)
    if state.best and not ranks.from_main((checkpoints_dir(run_dir) / str(state.best.step)).is_dir()):
        log.say(f"The best checkpoint so far, step {state.best.step}, is not in this run: the next evaluation is best.")
        state.best = None
    run = Run(
        run_dir, config, ranks, hardware, data, split, eval_batches(data, config), engine, saver, log, stop, beat, state
    )
    beat.step = state.step
    if found and found.parent == checkpoints_dir(run_dir):
        run.saved_step = state.step
    return run


def _job_has_gpus(config: RunConfig) -> bool:
    """Tell whether a job was promised GPUs: one of its nodes must not go on with its CPUs for a night."""
    return config.launch.on_cluster and config.launch.asks_for_gpus and not config.trainer.use_cpu


def open_heartbeat(run_dir: Path, rank: int, config: RunConfig) -> Heartbeat:
    """Begin this rank's file of the present attempt."""
    return Heartbeat(rank_file(run_dir, current_attempt(), rank), rank, config.launch.heartbeat_s)


def current_attempt() -> int:
    """Return the number of this launch, as whoever started this process says."""
    return int(os.environ.get("ENC_ATTEMPT", 1))


def _checkpoint_to_resume(run_dir: Path, config: RunConfig, ranks: Ranks) -> Path | None:
    which = config.trainer.resume_from_checkpoint
    if not which:
        return None
    found, error = None, None
    if ranks.is_main:
        try:
            found, passed_over = find_checkpoint(run_dir, which)
            for status in passed_over:
                print(f"Passed over checkpoint {status.path}: {status.state}, {status.problems[0]}.", file=sys.stderr)
        except EncError as problem:
            error = problem
    ranks.agree(error)
    return ranks.from_main(found)


def describe(run: Run) -> list[tuple[str, str]]:
    """Return every choice that was resolved at start, with the reason a faster one is off."""
    config, plan, split = run.config, run.data.train.plan, run.split
    device, trainer = run.hardware.device.type, config.trainer
    whole = [
        *(["the last layer of all tokens"] if not trainer.last_layer_of_labels_only else []),
        *(["logits of all tokens"] if not trainer.masked_logits_only_loss else []),
    ]
    steps = config.trainer.max_steps
    epochs = steps * split.rows_per_step / plan.num_rows
    return [
        ("run", str(run.dir)),
        ("start", f"step {run.state.step} of {steps}" + (" (resumed)" if run.state.step else "")),
        ("model", f"{config.model.type}, {num_parameters(config.model) / 1e6:.1f} M parameters, "
                  f"{config.model.num_hidden_layers} x {config.model.hidden_size}"),
        ("objective", _objective(config)),
        *_first_weights(run),
        ("data", f"{plan.num_rows} rows of {plan.row_length} tokens, fill {plan.fill:.4f}, {epochs:.2f} epochs"),
        ("evaluation", f"{len(run.data.eval)} rows" if run.data.eval else "none: the store has no eval split"
                       if config.trainer.eval_strategy != "no" else "off"),
        *([("test", f"{len(run.data.test)} rows, after the last step")] if run.data.test else []),
        ("batch", f"{split.rows_per_step} rows = {split.world_size} ranks x {split.accumulation} microbatches "
                  f"x {split.rows_per_microbatch} rows"),
        ("engine", engine_name(config) + (", one process" if split.world_size == 1 else "")),
        ("device", f"{run.hardware.name}, {'bf16 autocast' if run.hardware.bf16 else 'fp32'}"),
        *fast_paths.describe(config.model, device, run.hardware.dtype),
        ("last layer", f"whole: {' and '.join(whole)}" if whole else "labelled tokens only, like the logits"),
        ("compile", config.trainer.torch_compile_backend if config.trainer.torch_compile else "off"),
        ("batch workers", str(num_workers(config, device == "cuda"))),
        ("MFU against", f"{run.hardware.peak_flops / 1e12:.2f} TFLOP/s ({run.hardware.peak_source})"),
    ]  # fmt: skip


def _objective(config: RunConfig) -> str:
    collator, name = config.datacollator, config.trained_objective
    chosen = {"mlm": "masked", "mpnet": "masked and permuted", "plm": "permuted"}[name]
    return f"{name}: {collator.mlm_probability:.1%} of the tokens {chosen}{', whole words' * collator.whole_word}"


def _first_weights(run: Run) -> list[tuple[str, str]]:
    folder = None if run.state.step else first_weights.folder_of(run.config.model)
    return [("first weights", str(folder))] if folder else []


def main(run_dir: Path) -> NoReturn:
    """Run the training process of this rank and leave it with exit code 0, 2, 3 or 75."""
    stop = StopFlag()
    stop.install()
    if "ENC_LAUNCHER_PID" in os.environ:
        die_with_parent(int(os.environ["ENC_LAUNCHER_PID"]))
    rank = int(os.environ.get("RANK", 0))
    run: Run | None = None
    beat: Heartbeat | None = None
    code, message, lost_peer = 0, None, False
    try:
        config = load_run(run_dir)
        beat = open_heartbeat(run_dir, rank, config)
        use_cuda = not config.trainer.use_cpu and torch.cuda.is_available()
        if not use_cuda and _job_has_gpus(config):
            raise RunError(f"The job asked for GPUs, and torch sees none on {host_name()}.")
        ranks = Ranks.join(use_cuda, needs_group=config.parallel.engine in ("fsdp", "deepspeed"))
        _refuse_strangers(ranks, f"{run_dir.absolute()}, attempt {current_attempt()}")
        run = build(run_dir, ranks, config, stop, beat)
        announce(run)
        train(run)
        run.log.event(Event.FINISHED, step=run.state.step)
    except Stopped as error:
        code, message = error.exit_code, str(error)
    except EncError as error:
        code, message, lost_peer = error.exit_code, str(error), is_lost_peer(error)
        _record_failure(run, message)
    except KeyboardInterrupt:
        message = "Interrupted before the state was saved. Go on with `enc resume latest`."
        _record_failure(run, message)
        _leave(3, message, beat)
    except Exception as error:
        code, message = 3, f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"
        lost_peer = is_lost_peer(error)
        _record_failure(run, message)
        message += f". The traceback is in {_write_traceback(run_dir, rank)}."
    if run is not None:
        run.saver.drain()
        run.log.close(code)
    _leave(code, message if rank == 0 or code == 3 else None, beat, lost_peer)


def _leave(code: int, message: str | None, beat: Heartbeat | None, lost_peer: bool = False) -> NoReturn:
    if beat is not None:
        beat.end(code, message, lost_peer)
    if message:
        print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    sys.stderr.flush()
    # No teardown: DDP's destructor joins gloo's threads while it holds the interpreter lock that they wait for, and one
    # exit in ten or so hangs. Everything is on disk; batch workers die with their parent.
    os._exit(code)


def _refuse_strangers(ranks: Ranks, run: str) -> None:
    """Raise RunError when ranks of another run have met these, at a port that both took; collective."""
    met = set(ranks.gather(run))
    if len(met) > 1:
        raise RunError(f"Ranks of different runs met at one port: {'; '.join(sorted(met))}. Start again.")


def announce(run: Run) -> None:
    """Say and record what was resolved at start."""
    lines = describe(run)
    run.log.say(table(lines))
    event = Event.RESUMED if run.state.step else Event.STARTED
    run.log.event(event, step=run.state.step, world_size=run.ranks.world_size, **{"choices": dict(lines)})


def _record_failure(run: Run | None, message: str) -> None:
    if run is not None:
        run.log.event(Event.FAILED, step=run.state.step, error=message)


def _write_traceback(run_dir: Path, rank: int) -> Path:
    path = run_dir / "logs" / f"traceback-rank{rank}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(traceback.format_exc())
    return path


if __name__ == "__main__":
    main(Path(sys.argv[1]))
