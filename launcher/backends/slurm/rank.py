"""One task of a job: `python -m enc.launcher.rank RUN_DIR`, started by srun once a rank.

It finds the rank's place, runs the trainer as its child, passes stop signals on and writes down how it ended if it
could not, because it was killed or never got so far. Exit code 0 stands for 0 and 75: srun must not take a saved stop
for a failure.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from enc.encoder.errors import EncError
from enc.encoder.heartbeat import note_rank, rank_file, read_rank_file
from enc.launcher.backends.slurm import commands as slurm
from enc.launcher.backends.slurm import next_job
from enc.launcher.machine.rank_environment import Place, blocked_stop_signals
from enc.launcher.supervise.attempt import GRACE_S, POLL_S
from enc.launcher.supervise.signals import Signals
from enc.launcher.supervise.trainer import start_trainer


def place_of_task(variables: Mapping[str, str]) -> Place:
    """Read a task's place from what srun and the supervisor set."""
    tasks = int(variables["SLURM_NTASKS"])
    per_node = tasks // int(variables["SLURM_STEP_NUM_NODES"])
    return Place(
        rank=int(variables["SLURM_PROCID"]), local_rank=int(variables["SLURM_LOCALID"]), world_size=tasks,
        local_world_size=per_node, address=variables["ENC_MASTER_ADDR"], port=int(variables["ENC_MASTER_PORT"]),
        node=variables.get("SLURMD_NODENAME") or socket.gethostname(),
    )  # fmt: skip


def main(run_dir: Path) -> NoReturn:
    """Run the trainer of this task to its end."""
    place, attempt = place_of_task(os.environ), int(os.environ["ENC_ATTEMPT"])
    os.environ["ENC_NODE_NAME"] = place.node  # for what this process itself notes
    log = run_dir / "logs" / str(attempt) / f"rank{place.rank}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with blocked_stop_signals(), log.open("a") as output:
        child = start_trainer(run_dir, place, output)
        signals = Signals()
        note_rank(run_dir, attempt, place.rank)  # from now on signals are safe here, and the supervisor may send some
    code = _wait(child, signals, Guard(run_dir) if place.rank == 0 else None)
    if (read_rank_file(rank_file(run_dir, attempt, place.rank)) or {}).get("code") is None:
        note_rank(run_dir, attempt, place.rank, code=code, error=None, lost_peer=False)
    if code not in (0, 75):
        time.sleep(GRACE_S + 10)  # srun kills the others once this one fails; the supervisor ends them all sooner
    sys.exit(0 if code in (0, 75) else code if code > 0 else 3)


def _wait(child: subprocess.Popen[bytes], signals: Signals, guard: "Guard | None") -> int:
    """Wait for the trainer, passing signals on, and until the next job is asked for if that falls to this rank."""
    while (code := child.poll()) is None:
        while (number := signals.take()) is not None:
            # SIGINT as SIGTERM: SLURM may have sent the trainer one too, and a second would be final.
            child.send_signal(signal.SIGTERM if number == signal.SIGINT else number)
        if guard is not None:
            guard.ask_if_lost()
        signals.wait(POLL_S)
    while guard is not None and guard.ask_if_lost():
        time.sleep(POLL_S)
    return code


class Guard:
    """Watches the supervisor: when that process was killed, nobody else would ask for the run's next job."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.job = os.environ["SLURM_JOB_ID"]
        self.supervisor = int(os.environ["ENC_SUPERVISOR_PID"])
        here = os.environ["ENC_SUPERVISOR_HOST"] == socket.gethostname()
        self.idle = not (here and self._is_alive())  # not to be seen from here: leave it alone

    def _is_alive(self) -> bool:
        return Path(f"/proc/{self.supervisor}").exists()

    def ask_if_lost(self) -> bool:
        """Ask for the next job, once, if the supervisor is gone; tell whether that is still to be done.

        The supervisor only ends by itself after all ranks have. SLURM has to have noticed its end too: a job that it
        still takes for running would be requeued, and then fail all the same.
        """
        if self.idle or self._is_alive():
            return False
        try:
            job = slurm.find_job(self.job, timeout_s=10)
            if job is not None and job.state == "RUNNING":
                return True
            self.idle = True
            next_job.after_lost_supervisor(self.run_dir, self.job)
        except slurm.NoAnswer:
            return True
        except EncError as error:
            self.idle = True
            print(f"The supervisor was killed, and no other job could be had: {error}", file=sys.stderr, flush=True)
        return False
