"""Asking the schedulers what became of jobs, all of several runs at once."""

import re
from dataclasses import dataclass, field

from enc.encoder.errors import UsageError
from enc.launcher.backends.interface import Backend
from enc.launcher.backends.registry import BACKENDS
from enc.launcher.run_folder.job import Job
from enc.launcher.watch.run_state import RunFiles

PATIENCE_S = 5.0  # with a scheduler


@dataclass
class Answers:
    """What schedulers know of the jobs that they were asked for."""

    jobs: dict[str, Job] = field(default_factory=dict)
    unanswered: set[str] = field(default_factory=set)
    problem: str | None = None
    """Why some could not be asked."""

    def about(self, files: RunFiles) -> dict[str, Job] | None:
        """Return what is known of a run's jobs; None when that could not be asked."""
        return self.jobs if self.unanswered.isdisjoint(files.jobs) else None


def ask_schedulers(ids: list[str]) -> Answers:
    """Ask the schedulers of these jobs, each in one call."""
    answers = Answers()
    for backend in BACKENDS.values():
        own = [job for job in ids if backend.owns(job)]
        problem = _ask(backend, own, answers) if own else None
        if problem:
            answers.unanswered |= set(own)
            answers.problem = problem
    return answers


def _ask(backend: Backend, ids: list[str], answers: Answers) -> str | None:
    """Add what a scheduler knows of its jobs; return why it could not be asked, if so."""
    if not backend.is_installed():
        return f"{backend.title} is not installed on this machine: this is what the files say."
    try:
        answers.jobs |= backend.jobs(ids, PATIENCE_S)
    except UsageError as error:
        return f"{backend.title} could not be asked, this is what the files say. {last_words(error)}"
    return None


def last_words(error: Exception) -> str:
    """Return the last thing that a scheduler's command said, which is what went wrong."""
    return re.split(r"(?:error|fatal): ", str(error))[-1].rstrip(".") + "."
