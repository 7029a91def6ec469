"""Where the ranks of an attempt run, as `supervise` sees it. A backend gives its own (`enc.launcher.backends`)."""

from typing import Protocol


class Host(Protocol):
    """The machines that a job has, and what can be done there."""

    nodes: list[str]
    restart_count: int
    restarts: bool
    """Whether a run goes on by itself here. Where it does not, each attempt is the last one, and a person decides."""

    @property
    def job(self) -> str | None:
        """The job that this process is in; None for a run that a person started in the foreground."""

    def start(self, attempt: int, world_size: int) -> None:
        """Start all ranks."""

    def running(self) -> bool:
        """Tell whether any rank is left."""

    def exit_codes(self) -> dict[int, int | None]:
        """Return the codes of ranks whose end this process sees itself, None of those that still run."""

    def signal(self, number: int) -> None:
        """Pass a stop signal on to all ranks, once they can take one."""

    def kill(self) -> None:
        """Kill what is left of the ranks, also those that are stopped."""

    def end_time(self) -> float | None:
        """Return when the job will be ended (Unix seconds), or None when nobody knows."""

    def is_warning(self, number: int) -> bool:
        """Tell whether a signal is the scheduler's own warning that the job ends soon, and no wish to stop now."""

    def interruption(self) -> str | None:
        """Return what the scheduler did to the job: cancelled, time_limit, preempted, requeued, or None."""

    def never_started(self) -> dict[int, str]:
        """Return ranks whose process ended by itself before it could say a word, with what is known of it."""

    def unhealthy(self) -> str | None:
        """Return why ranks cannot be started here again, or None."""

    def next_job_by(self, must_be_new: bool) -> str:
        """Return how the job that goes on is had: requeue, resubmit or next_task."""

    def next_job(self, must_be_new: bool) -> None:
        """Ask for the job that goes on; a requeued one ends this process soon. Raises UsageError without one."""

    def drop_next_jobs(self) -> None:
        """Give up jobs that wait to go on with the run: it needs none."""
