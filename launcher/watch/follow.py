"""Which log of a run is shown, and whether there is more to come."""

import time
from pathlib import Path
from typing import Any

from enc.encoder.errors import UsageError
from enc.encoder.printable import name_here
from enc.launcher.run_folder.logs import attempts, batch_log, log_file
from enc.launcher.watch.ask import Answers, ask_schedulers
from enc.launcher.watch.run_state import OVER, RunFiles, read_files, state_of

_ASK_S = 15.0  # between two questions to a scheduler while a log is followed


class LogChoice:
    """Which log the options of `enc logs` mean at this moment."""

    def __init__(self, run_dir: Path, rank: int | None, attempt: int | None, batch: bool) -> None:
        self.run_dir, self.rank, self.attempt, self.batch = run_dir, rank, attempt, batch
        self.note: str | None = None
        """What a person should know of the log that was chosen last."""

    def path(self) -> Path | None:
        """Return the log, if it is there."""
        files = self.files()
        self.note = None
        if self.attempt is not None and self.attempt not in attempts(self.run_dir):
            return None
        if self.batch:
            return batch_log(self.run_dir, next(iter(files.jobs), None))
        found = log_file(self.run_dir, self.attempt or files.attempt, self.rank)
        if found is None and self.rank is None and self.attempt is None:
            found = batch_log(self.run_dir, next(iter(files.jobs), None))
            if found:
                where = name_here(found)
                self.note = f"Rank 0 has said nothing yet; this is the batch process's log, {where}."
        elif self.rank == 0 and found is not None and found.name == "console.log":
            self.note = f"Rank 0 of a local run writes to the terminal; this is what it logs, {name_here(found)}."
        return found

    def files(self) -> RunFiles:
        """Read the run's files as they are now."""
        return read_files(self.run_dir, brief=True)

    def refuse(self) -> None:
        """Raise UsageError: there is no such log."""
        there, name = attempts(self.run_dir), name_here(self.run_dir)
        if self.attempt is not None and self.attempt not in there:
            listed = ", ".join(map(str, there)) or "none"
            raise UsageError(f"{name} has no log of attempt {self.attempt}. Attempts with logs: {listed}.")
        kind = "batch process" if self.batch else "rank 0" if self.rank is None else f"rank {self.rank}"
        raise UsageError(
            f"{name} has no log of its {kind}{' yet' if self.attempt is None else ''}. "
            f"See what it is doing with `enc status {name}`."
        )


class FollowedRun:
    """Whether the followed run, or the chosen attempt of it, is over; schedulers are asked now and then only."""

    def __init__(self, chosen: LogChoice) -> None:
        self.chosen = chosen
        self.answers = Answers()
        self.asked_about: tuple[Any, ...] = ()
        self.asked_at = 0.0
        self.state = ""

    def is_over(self) -> bool:
        """Tell whether no more is to come."""
        files, attempt = self.chosen.files(), self.chosen.attempt
        if attempt is not None and (files.attempt or 0) > attempt:
            self.state = f"attempt {attempt} is over"
            return True
        about = (files.jobs, files.history.status)
        interval_s = _ASK_S / 3 if self.state == "stopping" else _ASK_S
        if about != self.asked_about or (self.state not in OVER and time.monotonic() - self.asked_at > interval_s):
            self.answers = ask_schedulers(files.jobs)
            self.asked_about, self.asked_at = about, time.monotonic()
        self.state = state_of(files, self.answers.about(files), time.time()).state
        return self.state in OVER and not files.lock.held
