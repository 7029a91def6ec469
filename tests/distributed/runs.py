"""One rank of several runs, one after the other, each in a process that is forked after the slow imports.

Usage: runs.py ACTION FILE, where FILE lists run folders that hold a rendered config.yaml, each with a free port. ACTION
is a function below.
"""

import gc
import json
import math
import os
import sys
import traceback
from pathlib import Path

import deepspeed  # noqa: F401
import pytest
import torch
from mixed_optimizer import put_in
from torch.distributed.tensor import DTensor

from enc.encoder.config.load import load_text
from enc.encoder.errors import RunError
from enc.encoder.ranks import Ranks
from enc.encoder.run.parts import Run
from enc.encoder.run.pretraining import build_model
from enc.encoder.run.start import announce, build, open_heartbeat
from enc.encoder.run.train import train
from enc.encoder.signals import StopFlag
from enc.encoder.sizing.memory import peak_bytes, static_bytes


def open_run(run_dir: Path, ranks: Ranks) -> Run:
    config = load_text((run_dir / "config.yaml").read_text(), str(run_dir)).config
    return build(run_dir, ranks, config, StopFlag(), open_heartbeat(run_dir, ranks.rank, config))


def train_run(run_dir: Path, ranks: Ranks) -> None:
    """Train as `enc.encoder.run.start` does."""
    run = open_run(run_dir, ranks)
    announce(run)
    train(run)
    run.reporter.log.close(0)


def check_contract(run_dir: Path, ranks: Ranks) -> None:
    """Hold an engine to its interface: skipped updates, named state, norms."""
    run = open_run(run_dir, ranks)
    engine, names = run.engine, list(run.engine.state_shapes)
    batch = run.task.data.first_batch(run.task.share)

    def update(factor: float) -> float:
        engine.backward(engine.forward(batch, True).loss_sum * factor / batch.num_labels, True)
        return engine.step(1e-2)

    def state() -> dict[str, torch.Tensor]:
        return engine.gather(lambda name: True)

    def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(a[name], b[name]) for name in names)

    before = state()
    assert list(before) == names
    assert {name: tuple(tensor.shape) for name, tensor in before.items()} == engine.state_shapes
    assert not any(before[name].any() for name in names if name not in engine.shapes), "moments start at zero"
    norm = update(math.nan if ranks.rank == ranks.world_size - 1 else 1.0)
    assert not math.isfinite(norm)
    assert same(state(), before), "a gradient with a NaN on one rank must change nothing"
    assert engine.optimizer_steps == 0
    assert math.isfinite(update(1.0))
    after = state()
    assert not any(torch.equal(after[name], before[name]) for name in names), "every tensor takes part in an update"
    assert engine.optimizer_steps == 1
    expected = math.sqrt(sum(after[name].double().square().sum().item() for name in engine.shapes))
    assert math.isclose(engine.weight_norm(), expected, rel_tol=1e-6)

    generator = torch.Generator().manual_seed(1)
    drawn = {name: torch.randn(after[name].shape, generator=generator).abs() * 0.1 for name in names}
    engine.load(drawn.__getitem__, 7)
    assert same(state(), drawn)
    assert engine.optimizer_steps == 7
    model, objective = build_model(run.config, run.task.model.num_tokens)
    model.load_state_dict({name: drawn[name] for name in engine.shapes})
    with torch.no_grad():
        loss, expected = (module(batch).loss_sum.item() for module in (engine.module, objective))
    assert math.isclose(loss, expected, rel_tol=1e-5), "the loaded weights are those that the model computes with"
    with pytest.raises(RunError, match="no room"):  # what one rank says reaches all
        ranks.agree(RunError("no room") if ranks.rank == 1 else None)


def count_bytes(run_dir: Path, ranks: Ranks) -> None:
    """Write the bytes of all tensors that two updates leave alive, beside those that `static_bytes` computes."""
    before = held_bytes()
    run = open_run(run_dir, ranks)
    batch = run.task.data.first_batch(run.task.share)
    for _ in range(2):
        run.engine.backward(run.engine.forward(batch, True).loss_sum / batch.num_labels, True)
        run.engine.step(1e-3)
    static = static_bytes(run.config, ranks.world_size)
    held = held_bytes() - before
    (run_dir / "bytes.json").write_text(json.dumps({"held": held, "computed": static.device + static.host}))


def check_another_optimizer(run_dir: Path, ranks: Ranks) -> None:
    """Hold an engine to its interface, and its memory to what is computed, with an optimizer unlike Adam."""
    with pytest.MonkeyPatch.context() as patch:
        put_in(patch)
        check_contract(run_dir, ranks)
        count_bytes(run_dir, ranks)


def measure_peak(run_dir: Path, ranks: Ranks) -> None:
    """Write the most GPU memory that three updates allocate, beside what is computed."""
    run = open_run(run_dir, ranks)
    batch = run.task.data.first_batch(run.task.share).to(run.place.hardware.device)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        run.engine.backward(run.engine.forward(batch, True).loss_sum / batch.num_labels, True)
        run.engine.step(1e-3)
    computed = peak_bytes(run.config, ranks.world_size, run.task.share.split.rows_per_microbatch)
    peak = torch.cuda.max_memory_allocated()
    (run_dir / "bytes.json").write_text(json.dumps({"peak": peak, "computed": computed}))


def held_bytes() -> int:
    """Return the bytes of all storages that live tensors point to, each counted once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and not thing.is_meta:
            local = thing.to_local() if isinstance(thing, DTensor) else thing
            storages[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
    return sum(storages.values())


def act(action: str, run_dir: Path, port: int) -> None:
    """Do one action with one run on this rank; what goes wrong is written into the run folder."""
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    try:
        ranks = Ranks.join(use_cuda=torch.cuda.is_available(), needs_group=True)
        globals()[action](run_dir, ranks)
        ranks.barrier()
    except Exception:
        (run_dir / f"failed-{os.environ['RANK']}.txt").write_text(traceback.format_exc())


def main(action: str, file: Path) -> None:
    for name, port in json.loads(file.read_text()):
        child = os.fork()
        if child == 0:
            act(action, Path(name), port)
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
