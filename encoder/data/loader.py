"""Processes that prepare a rank's batches ahead."""

import os
from typing import TypeVar

from torch.utils.data import DataLoader, Dataset

from enc.encoder.config.schema import RunConfig
from enc.encoder.signals import die_with_parent, shield_worker

_MAX_WORKERS = 16

Batch = TypeVar("Batch")


def make_loader(batches: Dataset[Batch], indices: range, config: RunConfig, cuda: bool) -> DataLoader[Batch]:
    """Return the batches of these indices in order."""
    workers = num_workers(config, cuda)
    return DataLoader(
        batches,
        batch_size=None,
        sampler=indices,
        num_workers=workers,
        prefetch_factor=(config.dataset.prefetch_factor or 4) if workers else None,
        pin_memory=cuda,
        worker_init_fn=_init_worker,
        multiprocessing_context="fork" if workers else None,  # workers share the opened store and the packing plan
    )


def num_workers(config: RunConfig, cuda: bool) -> int:
    """Return the number of batch workers of one rank."""
    if config.dataset.num_workers is not None:
        return config.dataset.num_workers
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(_MAX_WORKERS, cores)) if cuda else 1


def _init_worker(worker_id: int) -> None:
    die_with_parent()
    shield_worker(worker_id)
