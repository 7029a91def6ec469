"""Stop signals that reach a process which looks after others, and a pause that one of them, or a child's end, cuts."""

import contextlib
import os
import select
import signal
from types import TracebackType

from enc.encoder.signals import STOP_SIGNALS


class Signals:
    """Remembers stop signals from now on; they do not end this process any more."""

    def __init__(self) -> None:
        self._got: list[int] = []
        self._awake, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)  # ignored signals wake nobody
        for number in STOP_SIGNALS:
            signal.signal(number, lambda got, _frame: self._got.append(got))

    def take(self) -> int | None:
        """Return the oldest signal that was not taken yet."""
        return self._got.pop(0) if self._got else None

    def wait(self, seconds: float) -> None:
        """Pause, until a signal comes or a child ends."""
        if select.select([self._awake], [], [], 0 if self._got else seconds)[0]:
            with contextlib.suppress(BlockingIOError):
                os.read(self._awake, 4096)

    def __enter__(self) -> "Signals":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close what `wait` needs; signals go on to be remembered, for the process leaves with a code of its own."""
        signal.set_wakeup_fd(-1)
        os.close(self._awake)
        os.close(self._wake)
