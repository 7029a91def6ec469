"""Processes that prepare a rank's batches ahead."""

import os
import time
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

from torch.utils.data import DataLoader, Dataset

from enc.encoder.config.schema import RunConfig
from enc.encoder.errors import RunError
from enc.encoder.signals import die_with_parent, shield_worker

_MAX_WORKERS = 16
_LOOK_EVERY_S = 2.0  # whether to stop, while no batch comes


class Shareable(Protocol):
    """What a worker hands to its rank."""

    def share_memory(self) -> None:
        """Move all tensors into shared memory."""


Batch = TypeVar("Batch", bound=Shareable)


def make_loader(batches: Dataset[Batch], indices: range, config: RunConfig, cuda: bool) -> DataLoader[Batch]:
    """Return the batches of these indices in order."""
    workers = num_workers(config, cuda)
    return DataLoader(
        _Shared(batches) if workers else batches,
        batch_size=None,
        sampler=indices,
        num_workers=workers,
        prefetch_factor=(config.dataset.prefetch_factor or 4) if workers else None,
        pin_memory=cuda,
        timeout=_LOOK_EVERY_S if workers else 0,
        worker_init_fn=_init_worker,
        multiprocessing_context="fork" if workers else None,  # workers share the opened store and the packing plan
    )


class _Shared(Dataset[Batch]):
    """Batches of a worker, put into shared memory where an error is still told to the rank.

    DataLoader does it on a thread of the queue, which prints the error and loses the batch: the rank would wait for it.
    """

    def __init__(self, batches: Dataset[Batch]) -> None:
        self.batches = batches

    def __getitem__(self, index: int) -> Batch:
        batch = self.batches[index]
        batch.share_memory()
        return batch


def awaited(batches: Iterator[Batch], should_stop: Callable[[], bool], timeout_s: float) -> Iterator[Batch]:
    """Yield what a loader gives; end early when told to stop while one is long in coming.

    Raises RunError when a worker fails, or when no batch comes within `timeout_s`.
    """
    asked_at = time.monotonic()
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:  # the one kind that DataLoader and its workers have for everything
            if not str(error).startswith("DataLoader timed out"):
                raise _of_worker(error) from error
            if should_stop():
                return
            if time.monotonic() - asked_at > timeout_s:
                raise RunError(
                    f"No batch came within {timeout_s:g} s (launch.hang_timeout_s): the batch workers stand still, or "
                    "the disk of the token store does. Go on with `enc resume latest`, on another disk if it was that."
                ) from None
            continue
        yield batch
        asked_at = time.monotonic()


def _of_worker(error: RuntimeError) -> Exception:
    """Return what a batch worker met, as a person can act on it."""
    if "shared memory" in str(error) or "/torch_" in str(error):
        said = str(error).strip().splitlines()[-1]
        return RunError(
            f"The batches in flight do not fit into /dev/shm ({said}). Give it more (`--shm-size=8g` or `--ipc=host` "
            "for a container), or lower dataset.num_workers, dataset.prefetch_factor or "
            "trainer.per_device_train_batch_size."
        )
    return error


def num_workers(config: RunConfig, cuda: bool) -> int:
    """Return the number of batch workers of one rank."""
    if config.dataset.num_workers is not None:
        return config.dataset.num_workers
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(_MAX_WORKERS, cores)) if cuda else 1


def _init_worker(worker_id: int) -> None:
    die_with_parent()
    shield_worker(worker_id)
