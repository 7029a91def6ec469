"""A rank never waits for its batches without end: not for one that was lost, and not when it is told to stop."""

import time
from collections.abc import Iterator

import pytest
from torch.utils.data import DataLoader, Dataset

from enc.encoder.config.load import load_text
from enc.encoder.data.loader import awaited, make_loader
from enc.encoder.errors import RunError

CONFIG = load_text("dataset: {num_workers: 1}", "test").config


class Item:
    """A batch whose way to the rank may fail."""

    def __init__(self, error: str | None = None) -> None:
        self.error = error

    def share_memory(self) -> None:
        if self.error:
            raise RuntimeError(self.error)


class Items(Dataset[Item]):
    def __init__(self, error: str | None = None, slow: bool = False) -> None:
        self.error, self.slow = error, slow

    def __getitem__(self, index: int) -> Item:
        if self.slow and index:
            time.sleep(3)
        return Item(self.error if index else None)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("enc.encoder.data.loader._LOOK_EVERY_S", 0.2)


def loaded(items: Items) -> Iterator[Item]:
    loader: DataLoader[Item] = make_loader(items, range(3), CONFIG, cuda=False)
    return iter(loader)


def test_a_batch_that_does_not_fit_into_shared_memory_is_an_error() -> None:
    """It is told to the rank, and names /dev/shm and what to do."""
    said = "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)"
    batches = awaited(loaded(Items(said)), lambda: False, 30)
    next(batches)
    with pytest.raises(RunError, match=r"do not fit into /dev/shm .*No space left.*shm-size"):
        next(batches)


def test_another_error_of_a_worker_is_itself() -> None:
    batches = awaited(loaded(Items("a bug")), lambda: False, 30)
    next(batches)
    with pytest.raises(RuntimeError, match="a bug"):
        next(batches)


def test_a_stop_is_heard_while_no_batch_comes() -> None:
    batches = awaited(loaded(Items(slow=True)), lambda: True, 30)
    assert len(list(batches)) == 1


def test_a_batch_that_never_comes_is_an_error() -> None:
    batches = awaited(loaded(Items(slow=True)), lambda: False, 0.3)
    next(batches)
    with pytest.raises(RunError, match=r"No batch came within 0.3 s \(launch.hang_timeout_s\)"):
        next(batches)
