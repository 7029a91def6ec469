"""Seconds that the parts of a step take."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Stopwatch:
    """Seconds spent in named parts since the last reading; on a GPU the parts are synchronised only when read."""

    def __init__(self, cuda: bool, tell: Callable[[str], None] = lambda _part: None) -> None:
        """Call `tell` with the name of each part as it begins."""
        self.cuda = cuda
        self.tell = tell
        self.seconds: dict[str, float] = {}
        self.pending: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, part: str, on_device: bool = True) -> Iterator[None]:
        self.tell(part)
        if self.cuda and on_device:
            import torch

            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self.pending.append((part, start, end))
            return
        began = time.perf_counter()
        yield
        self._add(part, time.perf_counter() - began)

    def _add(self, part: str, seconds: float) -> None:
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    def read(self) -> dict[str, float]:
        """Return the sums and start again."""
        for part, start, end in self.pending:
            end.synchronize()
            self._add(part, start.elapsed_time(end) / 1000)
        result, self.seconds, self.pending = self.seconds, {}, []
        return result
