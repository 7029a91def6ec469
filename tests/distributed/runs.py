"""One rank of several runs, one after the other in the same processes: starting DeepSpeed for each takes too long.

Usage: runs.py ACTION FILE, where FILE lists run folders that hold a rendered config.yaml. ACTION is a function below.
"""

import gc
import json
import math
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from enc.encoder.build import build_model, train_loader
from enc.encoder.config_load import load_text
from enc.encoder.engine.interface import state_names
from enc.encoder.faults import StopFlag
from enc.encoder.ranks import Ranks
from enc.encoder.start import announce, build
from enc.encoder.train import Run, train


def open_run(run_dir: Path, ranks: Ranks) -> Run:
    config = load_text((run_dir / "config.yaml").read_text(), str(run_dir)).config
    return build(run_dir, ranks, config, StopFlag())


def train_run(run_dir: Path, ranks: Ranks) -> None:
    """Train as `enc.encoder.start` does."""
    run = open_run(run_dir, ranks)
    announce(run)
    train(run)
    run.log.close(0)


def check_contract(run_dir: Path, ranks: Ranks) -> None:
    """Hold an engine to its interface: skipped updates, named state, norms."""
    run = open_run(run_dir, ranks)
    engine, names = run.engine, state_names(list(run.engine.shapes))
    batch = next(iter(train_loader(run.data, run.config, run.split, ranks, False, 0)))

    def update(factor: float) -> float:
        engine.backward(engine.forward(batch, True).loss_sum * factor / batch.num_labels, True)
        return engine.step(1e-2)

    def state() -> dict[str, torch.Tensor]:
        return engine.gather(lambda name: True)

    def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(a[name], b[name]) for name in names)

    before = state()
    assert list(before) == names
    assert all(before[name].shape == engine.shapes[name] for name in engine.shapes)
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
    model, objective = build_model(run.config, run.data.tokenizer.num_tokens)
    model.load_state_dict({name: drawn[name] for name in engine.shapes})
    with torch.no_grad():
        loss, expected = (module(batch).loss_sum.item() for module in (engine.module, objective))
    assert math.isclose(loss, expected, rel_tol=1e-5), "the loaded weights are those that the model computes with"


def main(action: str, file: Path) -> None:
    torch.set_num_threads(1)
    ranks = Ranks.join(use_cuda=False, needs_group=True)
    for name in json.loads(file.read_text()):
        failed = None
        try:
            globals()[action](Path(name), ranks)
        except Exception:
            failed = traceback.format_exc()
            (Path(name) / f"failed-{ranks.rank}.txt").write_text(failed)
        gc.collect()
        dist.barrier()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    os._exit(0)
