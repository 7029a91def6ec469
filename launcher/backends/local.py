"""Starting a run on this machine: the only place where folders are changed and processes started.

The ranks run side by side and are watched from here. torchrun is not used: it turns every exit code into 1 and kills
ranks 30 s after a signal, whether or not their checkpoint is written.
"""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from enc.encoder.config.schema import RunConfig
from enc.encoder.printable import Say
from enc.encoder.signals import STOP_SIGNALS
from enc.launcher.checks.before_launch import check_before
from enc.launcher.checks.preflight import local_checks
from enc.launcher.machine.facts import MachineFacts
from enc.launcher.machine.rank_environment import Place, blocked_stop_signals, rank_environment
from enc.launcher.planning.plan import Plan, run_folder, with_tokens
from enc.launcher.planning.plan_text import plan_notes
from enc.launcher.planning.render import render
from enc.launcher.planning.resume import plan_or_resume, set_aside
from enc.launcher.run_folder.lock import RunLock
from enc.launcher.run_folder.records import move_aside, record_launch

_GRACE_S = 20.0


def launch(config: RunConfig, facts: MachineFacts, allow_change: bool, say: Say) -> int:
    """Prepare the data, write the run folder and train; return the exit code."""
    run_dir = run_folder(config, facts)
    lock = RunLock(run_dir)
    try:
        plan = with_tokens(plan_or_resume(config, facts, allow_change, say), say)
        check_before(plan, facts, local_checks(plan, facts), say)
        if plan.config.trainer.resume_from_checkpoint:
            set_aside(run_dir, Path(str(plan.config.trainer.resume_from_checkpoint)), say)
        else:
            move_aside(run_dir, say)
        say(f"Engine: {plan.engine}, {plan.engine_reason}.")
        for note in plan_notes(plan):
            say(note)
        relay = SignalRelay()  # from here on there is a run, and a signal is for its ranks
        attempt = record_launch(run_dir, render(plan), sys.argv, plan.as_dict())
    except BaseException:
        lock.release(remove_if_created=True)
        raise
    return start(run_dir, plan, attempt, lock, relay)


class SignalRelay:
    """Passes stop signals on to the ranks, also those that arrive before the ranks exist."""

    def __init__(self) -> None:
        self.early: list[int] = []
        self.processes: list[subprocess.Popen] = []
        for number in STOP_SIGNALS:
            signal.signal(number, self._pass_on)

    def _pass_on(self, number: int, _frame: object) -> None:
        if not self.processes:
            self.early.append(number)
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def connect(self, processes: list[subprocess.Popen]) -> None:
        """Name the ranks; what came early reaches them now."""
        self.processes = processes
        for number in self.early:
            self._pass_on(number, None)


def start(run_dir: Path, plan: Plan, attempt: int, lock: RunLock, relay: SignalRelay) -> int:
    """Run the training processes under the run's lock and return their common exit code."""
    command = [sys.executable, "-m", "enc.encoder.run.start", str(run_dir)]
    with blocked_stop_signals():
        processes = [_start_rank(command, rank, plan, attempt, lock) for rank in range(plan.split.world_size)]
        relay.connect(processes)
    return _watch(processes)


def _start_rank(command: list[str], rank: int, plan: Plan, attempt: int, lock: RunLock) -> subprocess.Popen:
    world_size = plan.split.world_size
    place = Place(rank, rank, world_size, world_size, "127.0.0.1", _port())
    environment = rank_environment(place, plan.config.launch.env | {"ENC_ATTEMPT": str(attempt)})
    output = None
    if rank > 0:
        folder = plan.run_dir / "logs" / str(attempt)
        folder.mkdir(parents=True, exist_ok=True)
        output = (folder / f"rank{rank}.log").open("a")
    # A group of its own: Ctrl-C reaches this process alone, which passes it on once.
    return subprocess.Popen(
        command, env=environment, stderr=output, stdout=output, pass_fds=[lock.file.fileno()], process_group=0
    )


_chosen_port: list[int] = []


def _port() -> int:
    """Return a TCP port that was free a moment ago, the same one for all ranks."""
    if not _chosen_port:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            _chosen_port.append(probe.getsockname()[1])
    return _chosen_port[0]


def _watch(processes: list[subprocess.Popen]) -> int:
    """Wait for all ranks; when one fails, the others get 20 s to end by themselves."""
    kill_at = None
    while any(process.poll() is None for process in processes):
        failed = any(process.poll() not in (None, 0, 75) for process in processes)
        if failed and kill_at is None:
            kill_at = time.monotonic() + _GRACE_S
        if kill_at is not None and time.monotonic() > kill_at:
            for process in processes:
                process.kill()
        time.sleep(0.05)
    return _common_exit_code([process.returncode for process in processes])


def _common_exit_code(codes: list[int]) -> int:
    """Return 0 or 75 when all ranks agree, else the code of the first failure; a killed rank counts as 3."""
    for rank, code in enumerate(codes):
        if code < 0:
            print(f"Rank {rank} was killed by {signal.Signals(-code).name}.", file=sys.stderr)
    bad = [code for code in codes if code not in (0, 75)]
    if bad:
        return 2 if 2 in bad else 3
    return max(codes)
