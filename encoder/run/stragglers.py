"""A rank that keeps the others waiting, step after step."""

import statistics
from dataclasses import dataclass
from typing import Any

from enc.encoder.heartbeat import host_name
from enc.encoder.ranks import Ranks

_RATIO, _SECONDS = 1.5, 0.02  # slower than the median by so much, and a step of so long at all
_LOG_LINES, _STEPS = 3, 100  # for so long, without a break


@dataclass
class Stragglers:
    """Looks for a rank that keeps the others waiting, by the part of a step that a rank does before it waits."""

    slowest_rank: int = -1
    log_lines: int = 0
    steps: int = 0

    def find(self, ranks: Ranks, own_s: float, steps: int) -> dict[str, Any] | None:
        """Compare the ranks' own seconds a step in the last `steps`; return who stays far behind, if so. Collective.

        With FSDP the forward pass waits too, so there only slow data is seen.
        """
        if ranks.world_size == 1:
            return None
        times = ranks.gather((own_s, host_name()))
        rank = max(range(len(times)), key=lambda r: times[r][0])
        slowest, host = times[rank]
        ratio = slowest / max(statistics.median(seconds for seconds, _ in times), 1e-9)
        if rank != self.slowest_rank or ratio < _RATIO or slowest < _SECONDS:
            self.slowest_rank, self.log_lines, self.steps = rank, 0, 0
            return None
        self.log_lines, self.steps = self.log_lines + 1, self.steps + steps
        if self.log_lines < _LOG_LINES or self.steps < _STEPS:
            return None
        self.log_lines = self.steps = 0
        return {"rank": rank, "host": host, "ratio": round(ratio, 2)}
