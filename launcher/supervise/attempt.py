"""One attempt of a run, from the start of its ranks to their last words.

    start all ranks -> stand by: relay signals, stop in time, end a hang or what a failure left over -> last words

It is the same for a job, a local run and a rehearsal: what differs is behind `Host`.
"""

import contextlib
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from enc.encoder.config.schema import RunConfig
from enc.encoder.events import Event, append_event
from enc.encoder.heartbeat import read_rank_files
from enc.encoder.sizing.sizes import checkpoint_bytes
from enc.launcher.supervise.deadline import Times, reserve_s
from enc.launcher.supervise.host import Host
from enc.launcher.supervise.policy import RankEnd
from enc.launcher.supervise.signals import Signals
from enc.launcher.supervise.watchdog import RankFiles, Watchdog, hang_text

GRACE_S = 20.0  # for the other ranks, when one has failed
POLL_S = 0.25
_LATE_S = 5.0


@dataclass
class Attempt:
    """One start of all ranks, and what was seen of it."""

    run_dir: Path
    number: int
    config: RunConfig
    world_size: int
    stopped_for: str | None = None  # the cause, when the supervisor itself stopped it
    files: RankFiles = field(default_factory=dict)


def say(text: str) -> None:
    """Write to the batch log."""
    with contextlib.suppress(OSError):  # the log lies on the run's disk, which may be full
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}", file=sys.stderr, flush=True)


def run_attempt(host: Host, attempt: Attempt, signals: Signals) -> list[RankEnd]:
    """Start the ranks, stand by until none is left, and return how each ended."""
    host.start(attempt.number, attempt.world_size)
    _stand_by(host, attempt, signals)
    attempt.files = _last_words(host, attempt)
    return _ends(host, attempt)


def _stand_by(host: Host, attempt: Attempt, signals: Signals) -> None:
    watchdog = Watchdog(attempt.config.launch.hang_timeout_s)
    look_every_s = max(POLL_S, attempt.config.launch.heartbeat_s / 2)
    looked_at, kill_at = 0.0, None
    while host.running():
        _relay(host, attempt, signals)
        now = time.monotonic()
        if now - looked_at >= look_every_s:
            looked_at, attempt.files = now, read_rank_files(attempt.run_dir, attempt.number)
            _stop_in_time(host, attempt)
            if host.restarts and _hangs(attempt, watchdog, now):
                kill_at = now
            kill_at = _kill_time(_codes(host, attempt), attempt.world_size, kill_at, now)
        if kill_at is not None and now >= kill_at:
            kill_at = now + GRACE_S
            host.kill()
        signals.wait(POLL_S)


def _relay(host: Host, attempt: Attempt, signals: Signals) -> None:
    """Pass on the signals that came; a mere warning counts only while the moment to stop is not measured."""
    while (number := signals.take()) is not None:
        if attempt.stopped_for is not None or not host.is_warning(number):
            host.signal(number)


def _codes(host: Host, attempt: Attempt) -> dict[int, int | None]:
    """Return the exit codes that are known; a rank whose process is seen has ended once that has, not when it says."""
    return {rank: file.get("code") for rank, file in attempt.files.items()} | host.exit_codes()


def _kill_time(codes: dict[int, int | None], world_size: int, kill_at: float | None, now: float) -> float | None:
    """Return when to kill what is left: some time after a failure, or at once when nobody is left to wait for."""
    if kill_at is None and any(code not in (None, 0, 75) for code in codes.values()):
        kill_at = now + GRACE_S
    if kill_at is not None and len(codes) == world_size and None not in codes.values():
        return now
    return kill_at


def _stop_in_time(host: Host, attempt: Attempt) -> None:
    """Stop the ranks when what saving and leaving takes, as measured, is all that is left of the job's time."""
    end = host.end_time()
    if end is None or attempt.stopped_for is not None:
        return
    files = attempt.files.values()
    step_s = max((file["step_s"] for file in files if file.get("step_s")), default=None)
    save_s = max((file["save_s"] for file in files if file.get("save_s")), default=None)
    reserve = reserve_s(Times(step_s, save_s), checkpoint_bytes(attempt.config))
    left = end - time.time()
    if left > reserve:
        return
    attempt.stopped_for = "time_limit"
    say(f"The job ends in {left:.0f} s; stopping may take {reserve:.0f} s. The run saves and leaves now.")
    host.signal(signal.SIGUSR1)


def _hangs(attempt: Attempt, watchdog: Watchdog, now: float) -> bool:
    """Tell, once, that no rank moves any more, and note who stands where."""
    if not watchdog.is_stuck(attempt.files, now) or attempt.stopped_for == "hang":
        return False
    attempt.stopped_for = "hang"
    ranks = watchdog.evidence(attempt.files, attempt.world_size, now)
    text = hang_text(ranks, watchdog.timeout_s)
    say(text)
    with contextlib.suppress(OSError):
        append_event(attempt.run_dir, Event.HANG, attempt=attempt.number, ranks=ranks[:16], detail=text)
    return True


def _last_words(host: Host, attempt: Attempt) -> RankFiles:
    """Read the ranks' files once more; a network file system may show those of other nodes some seconds late."""
    give_up = time.monotonic() + (0.0 if attempt.stopped_for == "hang" else _LATE_S)
    while True:
        attempt.files = read_rank_files(attempt.run_dir, attempt.number)
        known = [code for code in _codes(host, attempt).values() if code is not None]
        if len(known) == attempt.world_size or time.monotonic() > give_up:
            return attempt.files
        time.sleep(POLL_S)


def _ends(host: Host, attempt: Attempt) -> list[RankEnd]:
    """Put together the ranks' last words and what the host knows of them."""
    dead = {rank: text for rank, text in host.never_started().items() if rank not in attempt.files}
    seen = host.exit_codes()
    return [_end(host, attempt, rank, seen.get(rank), dead) for rank in range(attempt.world_size)]


def _end(host: Host, attempt: Attempt, rank: int, seen: int | None, dead: dict[int, str]) -> RankEnd:
    file: dict[str, Any] = attempt.files.get(rank, {})
    per_node = attempt.world_size // len(host.nodes)
    return RankEnd(
        rank=rank,
        node=file.get("host", host.nodes[rank // per_node]),
        phase=file.get("last_phase") or file.get("phase", "start"),
        step=file.get("step", 0),
        code=file.get("code") if seen is None else seen,
        error=file.get("error") or dead.get(rank),
        lost_peer=file.get("lost_peer", False),
        # When some are known never to have begun, the others were ended because of them.
        reported=bool(file) or seen is not None or (bool(dead) and rank not in dead),
    )
