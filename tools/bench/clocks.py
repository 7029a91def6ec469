"""Time and memory of a piece of work, measured the same way for every side.

Time: each side runs in turn, round after round, the order turning; a block of runs gives one number a round. On a GPU
CUDA events enclose each run, and the L2 cache is overwritten before it, which also gives the host a lead, so that the
time is the device's unless the host is the slower one. On a CPU a block is as long as the clock needs.

Memory: the most bytes that were allocated at once, less what the work returns. On a GPU that is torch's own peak
counter. On a CPU it is the running sum of the profiler's allocation events, which come from the allocator itself: a
dispatch mode would see the results of operators, but not the scratch memory inside them, and the resident size would
see freed pages too. What MKL and oneDNN allocate past torch's allocator is in neither.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Work = Callable[[], Sequence[Tensor]]  # its results
_CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Timer(Protocol):
    def num_runs(self, work: Work) -> int:
        """Warm the work up and return how many runs make a block."""

    def __call__(self, work: Work, runs: int) -> float:
        """Return the mean seconds of a run in a block of so many."""


@dataclass
class HostTimer:
    """Reads a clock of the host before and after a block."""

    now: Callable[[], float] = time.perf_counter
    block_s: float = 0.05
    warm_up_runs: int = 1

    def num_runs(self, work: Work) -> int:
        for _ in range(self.warm_up_runs):
            work()
        return max(1, round(self.block_s / max(self(work, 1), 1e-9)))

    def __call__(self, work: Work, runs: int) -> float:
        began = self.now()
        for _ in range(runs):
            work()
        return (self.now() - began) / runs


@dataclass
class CudaTimer:
    """Reads CUDA events around each run, after the L2 cache was overwritten."""

    device: torch.device
    block_s: float = 0.05
    warm_up_s: float = 0.3
    junk: Tensor = field(init=False)

    def __post_init__(self) -> None:
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        self.junk = torch.empty(max(4 * cache, 2**28), dtype=torch.int8, device=self.device)

    def num_runs(self, work: Work) -> int:
        work()  # compiles
        began, seconds = time.perf_counter(), 0.0
        while time.perf_counter() - began < self.warm_up_s:
            seconds = self(work, 3)
        return min(100, max(1, round(self.block_s / max(seconds, 1e-6))))

    def __call__(self, work: Work, runs: int) -> float:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
        for start, end in events:
            self.junk.zero_()
            start.record()
            work()
            end.record()
        torch.cuda.synchronize(self.device)
        return statistics.fmean(start.elapsed_time(end) for start, end in events) / 1000


def make_timer(device: torch.device, clock: str) -> Timer:
    """Return the timer of a device; `clock` is wall or cpu, for the CPU."""
    return CudaTimer(device) if device.type == "cuda" else HostTimer(_CLOCKS[clock])


def in_turn(works: dict[str, Work], rounds: int, timer: Timer) -> dict[str, list[float]]:
    """Return the seconds of a run of each side, one number a round."""
    runs = {name: timer.num_runs(work) for name, work in works.items()}
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds):
        for name in works if number % 2 == 0 else reversed(works):
            seconds[name].append(timer(works[name], runs[name]))
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def extra_bytes(work: Work, device: torch.device) -> int:
    """Return the peak of the bytes that one run allocates, less those of its results. Run it once before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        results = work()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            results = work()
        assert profiler.profiler is not None
        peak = _peak(profiler.profiler.kineto_results.events())
    return max(0, peak - _storage_bytes(results))


def _peak(events: Sequence[Any]) -> int:
    live = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()  # below 0 for memory that is given back
        peak = max(peak, live)
    return peak


def _storage_bytes(tensors: Sequence[Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
