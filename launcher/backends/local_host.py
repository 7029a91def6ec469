"""A run on this machine: its ranks are children of the launching process, which supervises them.

torchrun is not used: it turns every exit code into 1 and kills ranks 30 s after a signal, whether or not their
checkpoint is written.
"""

import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO, Any

from enc.encoder.printable import Say
from enc.launcher.machine.ports import free_port
from enc.launcher.machine.rank_environment import Place, blocked_stop_signals
from enc.launcher.planning.plan import Plan
from enc.launcher.planning.plan_text import plan_notes
from enc.launcher.planning.render import render
from enc.launcher.planning.resume import set_aside
from enc.launcher.run_folder.lock import RunLock
from enc.launcher.run_folder.records import move_aside, record_launch
from enc.launcher.supervise.attempt import Attempt
from enc.launcher.supervise.signals import Signals
from enc.launcher.supervise.supervise import supervise_here
from enc.launcher.supervise.trainer import start_trainer


def run_here(plan: Plan, lock: RunLock, say: Say) -> int:
    """Write the run folder and train; return the exit code."""
    if plan.config.trainer.resume_from_checkpoint:
        set_aside(plan.run_dir, Path(str(plan.config.trainer.resume_from_checkpoint)), say)
    else:
        move_aside(plan.run_dir, say)
    say(f"Engine: {plan.engine}, {plan.engine_reason}. Precision: {plan.precision}, {plan.precision_reason}.")
    for note in plan_notes(plan):
        say(note)
    with Signals() as signals:  # from here on there is a run, and a signal is for its ranks
        number = record_launch(plan.run_dir, render(plan), sys.argv, plan.as_dict())
        host = LocalHost(plan.run_dir, plan.config.launch.env, lock)
        code = supervise_here(host, Attempt(plan.run_dir, number, plan.config, plan.split.world_size), signals)
    for rank, end in host.exit_codes().items():
        if end is not None and end < 0:
            say(f"Rank {rank} was killed by {signal.Signals(-end).name}.")
    return code


class LocalHost:
    """The ranks of a local run, side by side; what rank 0 prints is on the terminal."""

    restarts = False

    def __init__(self, run_dir: Path, variables: Mapping[str, str], lock: RunLock | None) -> None:
        """`variables` are what the config adds to the environment; the ranks hold `lock` while they live."""
        self.run_dir, self.variables, self.lock = run_dir, variables, lock
        self.job: str | None = None
        self.nodes = [socket.gethostname()]
        self.restart_count = 0
        self.attempt = 0
        self.ranks: list[subprocess.Popen[bytes]] = []

    def start(self, attempt: int, world_size: int) -> None:
        self.attempt, self.ranks = attempt, []
        port, per_node = free_port(), world_size // len(self.nodes)
        more = {**self.variables, "ENC_ATTEMPT": str(attempt)}
        held = [] if self.lock is None else [self.lock.file.fileno()]
        with blocked_stop_signals():
            for rank in range(world_size):
                place = Place(rank, rank, world_size, world_size, "127.0.0.1", port, self.nodes[rank // per_node])
                with self._output(rank) as output:
                    # A group of its own: Ctrl-C reaches this process alone, which passes it on once.
                    started = start_trainer(self.run_dir, place, output, more, pass_fds=held, process_group=0)
                    self.ranks.append(started)

    def _output(self, rank: int) -> AbstractContextManager[IO[Any] | None]:
        return nullcontext() if rank == 0 else self._log(rank)

    def _log(self, rank: int) -> IO[Any]:
        folder = self.run_dir / "logs" / str(self.attempt)
        folder.mkdir(parents=True, exist_ok=True)
        return (folder / f"rank{rank}.log").open("a")

    def running(self) -> bool:
        return None in self.exit_codes().values()

    def exit_codes(self) -> dict[int, int | None]:
        return {rank: process.poll() for rank, process in enumerate(self.ranks)}

    def signal(self, number: int) -> None:
        for process in self.ranks:
            process.send_signal(number)  # does nothing to one that has ended

    def kill(self) -> None:
        for process in self.ranks:
            process.kill()

    def end_time(self) -> float | None:
        return None

    def is_warning(self, number: int) -> bool:
        return False

    def interruption(self) -> str | None:
        return None

    def never_started(self) -> dict[int, str]:
        return {}

    def unhealthy(self) -> str | None:
        return None

    def next_job_by(self, must_be_new: bool) -> str:
        raise AssertionError("nobody asks for a next job where `restarts` is False")

    def next_job(self, must_be_new: bool) -> None:
        raise AssertionError("nobody asks for a next job where `restarts` is False")

    def drop_next_jobs(self) -> None:
        pass
