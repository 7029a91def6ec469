"""Every error that a user can cause. The command line prints the message as one paragraph and exits with `exit_code`.

EncError
├── UsageError    2   a bad config, command, file or folder, found before anything was changed
│   └── DamagedError  a checkpoint of a known format that is not whole
├── RunError      3   a run or a tool that started and then failed
│   └── PeerError     the failure of another rank, told to this one
└── Stopped      75   a signal stopped the run after a checkpoint was saved: requeue it

A message says what is wrong, where, and what to do about it.
"""


class EncError(Exception):
    """Base of all errors that are reported without a traceback."""

    exit_code = 3


class UsageError(EncError):
    """The request itself is at fault; nothing was changed."""

    exit_code = 2


class DamagedError(UsageError):
    """A checkpoint is damaged or a part of it is missing."""


class RunError(EncError):
    """Something failed while running; what was finished before it is intact."""

    exit_code = 3


class PeerError(RunError):
    """Another rank failed; its own message says why."""


class Stopped(EncError):
    """A signal asked the run to stop; its state was saved first."""

    exit_code = 75


def first_line(error: BaseException) -> str:
    """Return the kind of an error and the first line that it says."""
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"
