"""Noticing that nothing moves: progress is what ranks say of their main threads, never that a log grows."""

from dataclasses import dataclass, field
from typing import Any

RankFiles = dict[int, dict[str, Any]]


@dataclass
class Watchdog:
    """Compares the ranks' files from one reading to the next, by this machine's own clock."""

    timeout_s: float
    marks: dict[int, int] = field(default_factory=dict)
    heard: dict[int, tuple[float, float]] = field(default_factory=dict)  # rank -> (its own time, when that changed)
    moved_at: float | None = None

    def is_stuck(self, files: RankFiles, now: float) -> bool:
        """Take note of the ranks' files; tell whether no rank has moved for too long. `now` is in seconds."""
        marks = {rank: file.get("marks", 0) for rank, file in files.items()}
        if marks != self.marks or self.moved_at is None:
            self.marks, self.moved_at = marks, now
        for rank, file in files.items():
            if self.heard.get(rank, (None, 0.0))[0] != file.get("time"):
                self.heard[rank] = (file.get("time", 0.0), now)
        return now - self.moved_at > self.timeout_s

    def evidence(self, files: RankFiles, world_size: int, now: float) -> list[dict[str, Any]]:
        """Return what is known of the ranks that stand still, the likely culprits first.

        A rank that has not even written its file is stopped or gone; among those that write, the one with the fewest
        changes of phase is the one that the others wait for.
        """
        seen = []
        for rank in range(world_size):
            file = files.get(rank, {})
            silent = now - self.heard[rank][1] if rank in self.heard else now - (self.moved_at or now)
            seen.append({
                "rank": rank, "host": file.get("host", "unknown"), "phase": file.get("phase", "not started"),
                "step": file.get("step", 0), "silent_s": round(silent, 1), "marks": file.get("marks", 0),
            })  # fmt: skip
        return sorted(seen, key=self._guilt)

    def _guilt(self, rank: dict[str, Any]) -> tuple[int, int]:
        """Return the sort key of a culprit: silence in steps of half the timeout, so that small delays do not count."""
        half_timeouts = int(rank["silent_s"] / max(self.timeout_s / 2, 1.0))
        return -half_timeouts, rank["marks"]


def hang_text(ranks: list[dict[str, Any]], timeout_s: float) -> str:
    """Say in one sentence who stands still."""
    first, others = ranks[0], ranks[1:]
    text = (
        f"No rank made progress for {timeout_s:.0f} s: rank {first['rank']} on {first['host']} is in {first['phase']} "
    )
    text += f"at step {first['step']}, silent for {first['silent_s']:.0f} s"
    phases = sorted({rank["phase"] for rank in others})
    return text + (f"; the others are in {', '.join(phases)}." if others else ".")
