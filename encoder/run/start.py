"""The training process: reads `config.yaml` of its run folder, nothing else.

build -> restore -> announce -> train -> leave with an exit code
"""

import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch

from enc.encoder.checkpoints.folder import checkpoints_dir, find_checkpoint
from enc.encoder.checkpoints.io import Saver, load
from enc.encoder.config.load import load_run
from enc.encoder.config.schema import RunConfig
from enc.encoder.data.loader import num_workers
from enc.encoder.engine.settings import engine_name
from enc.encoder.errors import EncError, RunError, Stopped, first_line
from enc.encoder.events import Event
from enc.encoder.hardware import Hardware
from enc.encoder.heartbeat import Heartbeat, host_name, rank_file
from enc.encoder.models import fast_paths
from enc.encoder.ranks import Ranks, is_lost_peer
from enc.encoder.run.build import build_engine
from enc.encoder.run.closing import closing
from enc.encoder.run.log import RunLog
from enc.encoder.run.parts import Place, Run
from enc.encoder.run.reporter import Reporter
from enc.encoder.run.state import read_state
from enc.encoder.run.task import make_task
from enc.encoder.run.train import train
from enc.encoder.signals import StopFlag, die_with_parent
from enc.encoder.sizing.sizes import num_parameters
from enc.encoder.text_table import fitted, table


def build(run_dir: Path, ranks: Ranks, config: RunConfig, stop: StopFlag, heartbeat: Heartbeat) -> Run:
    """Build every part of a run and restore its checkpoint, if it resumes from one."""
    heartbeat.mark("build")
    trainer = config.trainer
    hardware = Hardware.detect(trainer.use_cpu, ranks.local_rank, trainer.bf16, trainer.tf32)
    fast_paths.allow_kernels(config.model, hardware.device.type, hardware.dtype)
    task = make_task(config, ranks, hardware)
    if not trainer.resume_from_checkpoint:
        task.load_first_weights()
    engine = build_engine(run_dir, config, task, hardware.device)
    heartbeat.mark("warm_up")
    engine.warm_up(task.data.first_batch(task.share).to(hardware.device))
    heartbeat.mark("restore")
    found = _checkpoint_to_resume(run_dir, config, ranks)
    state = read_state(load(found, engine) if found else {}, task.record.empty_sums())
    attachments = [run_dir / "config.yaml", *task.data.attachments]
    saver = Saver(run_dir, ranks, attachments, trainer.save_total_limit, trainer.min_free_disk_gb)
    log = RunLog(run_dir, config, current_attempt(), ranks.is_main, state.step)
    if state.best and not ranks.from_main((checkpoints_dir(run_dir) / str(state.best.step)).is_dir()):
        log.say(f"The best checkpoint so far, step {state.best.step}, is not in this run: the next evaluation is best.")
        state.best = None
    heartbeat.step = state.step
    own_checkpoint = found is not None and found.parent == checkpoints_dir(run_dir)
    return Run(
        dir=run_dir,
        config=config,
        place=Place(ranks, hardware, stop),
        task=task,
        engine=engine,
        saver=saver,
        reporter=Reporter(log, heartbeat),
        state=state,
        saved_step=state.step if own_checkpoint else -1,
    )


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
    checkpoint: Path | None = ranks.from_main(found)
    return checkpoint


def describe(run: Run) -> list[tuple[str, str]]:
    """Return every choice that was resolved at start, with the reason a faster one is off."""
    config, hardware, split, steps = run.config, run.place.hardware, run.task.share.split, run.config.trainer.max_steps
    peak = hardware.peak_flops
    return [
        ("run", str(run.dir)),
        ("start", f"step {run.state.step} of {steps}" + (" (resumed)" if run.state.step else "")),
        ("model", f"{config.model.type}, {num_parameters(config) / 1e6:.1f} M parameters, "
                  f"{config.model.num_hidden_layers} x {config.model.hidden_size}"),
        *run.task.describe(run.state.step),
        ("batch", f"{split.rows_per_step} rows = {split.world_size} ranks x {split.accumulation} microbatches "
                  f"x {split.rows_per_microbatch} rows"),
        ("engine", engine_name(config) + (", one process" if split.world_size == 1 else "")),
        ("device", f"{hardware.name}, {'bf16 autocast' if hardware.bf16 else 'fp32'}"),
        *run.task.describe_computation(hardware),
        ("compile", config.trainer.torch_compile_backend if config.trainer.torch_compile else "off"),
        ("batch workers", str(num_workers(config, hardware.device.type == "cuda"))),
        *([("MFU against", f"{peak / 1e12:.2f} TFLOP/s ({hardware.peak_source})")] if peak else []),
    ]  # fmt: skip


@dataclass
class _Process:
    """What a training process has of its own, as far as it has come."""

    run_dir: Path
    rank: int
    stop: StopFlag
    heartbeat: Heartbeat | None = None
    run: Run | None = None


class _End(NamedTuple):
    """How a training process ends."""

    code: int
    message: str | None = None
    lost_peer: bool = False


def main(run_dir: Path) -> NoReturn:
    """Run the training process of this rank and leave it with exit code 0, 2, 3 or 75."""
    stop = StopFlag()
    stop.install()
    if "ENC_LAUNCHER_PID" in os.environ:
        die_with_parent(int(os.environ["ENC_LAUNCHER_PID"]))
    process = _Process(run_dir, int(os.environ.get("RANK", 0)), stop)
    end = _End(3, "Interrupted while the run was ending.")
    try:
        end = _run_to_its_end(process)
        _close(process, end)
    finally:  # also of an error on the way out: an interpreter that ends by itself waits for its batch workers for ever
        _leave(process, end)


def _run_to_its_end(process: _Process) -> _End:
    """Build and train a run; return how that ended, which is written down."""
    try:
        _run(process)
    except Stopped as error:
        return _End(error.exit_code, str(error))
    except EncError as error:
        return _failed(process, _End(error.exit_code, str(error), is_lost_peer(error)))
    except KeyboardInterrupt:
        return _failed(process, _End(3, "Interrupted before the state was saved. Go on with `enc resume latest`."))
    except Exception as error:
        end = _failed(process, _End(3, first_line(error), is_lost_peer(error)))
        return end._replace(message=f"{end.message}. {_write_traceback(process)}")
    return _End(0)


def _run(process: _Process) -> None:
    run_dir, config = process.run_dir, load_run(process.run_dir)
    process.heartbeat = open_heartbeat(run_dir, process.rank, config)
    use_cuda = not config.trainer.use_cpu and torch.cuda.is_available()
    if not use_cuda and _job_has_gpus(config):
        raise RunError(f"The job asked for GPUs, and torch sees none on {host_name()}.")
    ranks = Ranks.join(use_cuda, needs_group=config.parallel.engine in ("fsdp", "deepspeed"))
    _refuse_strangers(ranks, f"{run_dir.absolute()}, attempt {current_attempt()}")
    run = process.run = build(run_dir, ranks, config, process.stop, process.heartbeat)
    announce(run)
    began, start_step = time.monotonic(), run.state.step
    train(run)
    if ranks.is_main:
        run.reporter.log.say(closing(run_dir, config, run.state, start_step, time.monotonic() - began))
    run.reporter.log.event(Event.FINISHED, step=run.state.step)


def _failed(process: _Process, end: _End) -> _End:
    """Record that the run failed, if its disk takes that."""
    if (run := process.run) is not None:
        _as_far_as_possible(lambda: run.reporter.log.event(Event.FAILED, step=run.state.step, error=end.message))
    return end


def _write_traceback(process: _Process) -> str:
    """Write the traceback into the run folder and say where it is; print it where the folder takes nothing."""
    path = process.run_dir / "logs" / f"traceback-rank{process.rank}.txt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(traceback.format_exc())
    except OSError as error:
        traceback.print_exc()
        return f"The traceback is above: {path} cannot be written ({error.strerror})."
    return f"The traceback is in {path}."


def _close(process: _Process, end: _End) -> None:
    if (run := process.run) is not None:
        _as_far_as_possible(run.saver.drain)
        _as_far_as_possible(lambda: run.reporter.log.close(end.code))


def _as_far_as_possible(last_act: Callable[[], None]) -> None:
    """Do something on the way out; that it fails must not hide why the run ended, nor keep it from ending."""
    try:
        last_act()
    except Exception as error:
        print(f"While the run ended: {first_line(error)}", file=sys.stderr)


def _leave(process: _Process, end: _End) -> NoReturn:
    # No teardown: DDP's destructor joins gloo's threads while it holds the interpreter lock that they wait for, and one
    # exit in ten or so hangs. Everything is on disk; batch workers die with their parent.
    try:
        if process.heartbeat is not None:
            process.heartbeat.end(end.code, end.message, end.lost_peer)
        if end.message and (process.rank == 0 or end.code == 3):
            print(fitted(end.message, sys.stderr), file=sys.stderr, flush=True)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(end.code)


def _refuse_strangers(ranks: Ranks, run: str) -> None:
    """Raise RunError when ranks of another run have met these, at a port that both took; collective."""
    met = set(ranks.gather(run))
    if len(met) > 1:
        raise RunError(f"Ranks of different runs met at one port: {'; '.join(sorted(met))}. Start again.")


def announce(run: Run) -> None:
    """Say and record what was resolved at start."""
    lines = describe(run)
    run.reporter.log.say(table(lines))
    event = Event.RESUMED if run.state.step else Event.STARTED
    run.reporter.log.event(
        event, step=run.state.step, world_size=run.place.ranks.world_size, **{"choices": dict(lines)}
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
