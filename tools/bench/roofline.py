"""What a device reaches at most, measured: the rate of large matrix products and the bandwidth of a large copy.

The floor of a piece of work is the longer of its operations at that rate and its bytes at that bandwidth; a fraction of
the roofline is floor over time. Both peaks are the best of several runs, since anything else on the machine only takes
away from them. A copy of n bytes reads n and writes n.
"""

from dataclasses import asdict, dataclass

import torch

from enc.tools.bench.clocks import Timer

_RUNS = 8


@dataclass(frozen=True)
class Roofline:
    """The two peaks of a device for one dtype."""

    flops: float  # operations a second
    bandwidth: float  # bytes a second

    def floor_s(self, flops: float, num_bytes: float) -> float:
        """Return the least seconds that so many operations and bytes take."""
        return max(flops / self.flops, num_bytes / self.bandwidth)

    def best(self, other: "Roofline") -> "Roofline":
        """Return the higher of each peak."""
        return Roofline(max(self.flops, other.flops), max(self.bandwidth, other.bandwidth))

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def measure_roofline(
    device: torch.device, dtype: torch.dtype, timer: Timer, size: int | None = None, copy_bytes: int | None = None
) -> Roofline:
    """Measure both peaks with square products of `size` and copies of `copy_bytes`, large ones by default."""
    cuda = device.type == "cuda"
    size, copy_bytes = size or (8192 if cuda else 2048), copy_bytes or (2**30 if cuda else 2**28)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.ones(copy_bytes, dtype=torch.int8, device=device)
    target = torch.empty_like(source)

    def multiply() -> list[torch.Tensor]:
        return [torch.mm(a, b, out=product)]

    def copy() -> list[torch.Tensor]:
        return [target.copy_(source)]

    seconds = []
    for work in (multiply, copy):
        timer.num_runs(work)
        seconds.append(min(timer(work, 1) for _ in range(_RUNS)))
    return Roofline(2 * size**3 / seconds[0], 2 * copy_bytes / seconds[1])
