"""Signals and parents: how a training process learns that it should stop.

A signal only sets a flag; the loop acts on it at the next boundary that all ranks agree on. `enc launch` starts ranks
with the signals blocked, so that one that arrives early is delivered once `StopFlag.install` is ready.
"""

import ctypes
import os
import select
import signal
import sys
import threading

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1


class StopFlag:
    """Remembers the first stop signal."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def install(self) -> None:
        """Take over the stop signals; a second SIGINT interrupts at once, an ignored SIGHUP (nohup) stays ignored."""
        for number in STOP_SIGNALS:
            if not (number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN):
                signal.signal(number, self._remember)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def _remember(self, number: int, _frame: object) -> None:
        if number == signal.SIGINT and self.signal_name == "SIGINT":
            raise KeyboardInterrupt
        self.signal_name = self.signal_name or signal.Signals(number).name

    def __bool__(self) -> bool:
        return self.signal_name is not None


def shield_worker(_worker_id: int = 0) -> None:
    """Make a batch worker deaf to stop signals: it has to live until the checkpoint is saved."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def die_with_parent(parent_pid: int | None = None) -> None:
    """Ask the kernel to kill this process when its parent dies, so that no rank is left running alone (Linux).

    A process whose parent, `parent_pid`, is gone already ends at once.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent_pid is not None and os.getppid() != parent_pid:
        os._exit(3)


def end_with_pipe(descriptor: int) -> None:
    """End this process when the other end of a pipe closes, whatever it is doing then.

    For helpers that any thread may have started: `die_with_parent` would kill them when that thread ends.
    """
    threading.Thread(target=_wait_for_hang_up, args=(descriptor,), daemon=True).start()


def _wait_for_hang_up(descriptor: int) -> None:
    poll = select.poll()
    poll.register(descriptor, 0)  # no events asked: only a hang-up wakes it
    poll.poll()
    os._exit(1)
