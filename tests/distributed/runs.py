"""One rank of several runs, one after the other in the same processes: starting DeepSpeed once a run takes too long.

Usage: runs.py FILE, where FILE lists run folders that hold a rendered config.yaml. Each is trained by the functions that
`enc.encoder.start` calls.
"""

import gc
import json
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from enc.encoder.config_load import load_text
from enc.encoder.faults import StopFlag
from enc.encoder.ranks import Ranks
from enc.encoder.start import announce, build
from enc.encoder.train import train


def train_one(run_dir: Path, ranks: Ranks) -> None:
    config = load_text((run_dir / "config.yaml").read_text(), str(run_dir)).config
    run = build(run_dir, ranks, config, StopFlag())
    announce(run)
    train(run)
    run.log.close(0)


def main(file: Path) -> None:
    torch.set_num_threads(1)
    ranks = Ranks.join(use_cuda=False, needs_group=True)
    for name in json.loads(file.read_text()):
        failed = None
        try:
            train_one(Path(name), ranks)
        except Exception:
            failed = traceback.format_exc()
            (Path(name) / f"failed-{ranks.rank}.txt").write_text(failed)
        gc.collect()
        dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    import os

    os._exit(0)
