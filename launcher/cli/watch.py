"""`enc status`, `enc logs`, `enc ls`, `enc cancel`: watching runs and stopping them."""

import json
import os
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from enc.launcher.cli.options import JsonOption, say

if TYPE_CHECKING:
    from enc.launcher.backends.slurm.commands import Job
    from enc.launcher.watch.run_state import RunFiles, RunState

RunArgument = Annotated[
    str | None, typer.Argument(metavar="RUN", help="Run folder or SLURM job; by default the newest run here.")
]
_PATIENCE_S = 5.0  # with SLURM
_ASK_SLURM_S = 15.0  # between two questions while a log is followed


def status(run: RunArgument = None, as_json: JsonOption = False) -> None:
    """Show what a run is doing: its state, step, loss, speed, time left, last checkpoint, why it last stopped."""
    from enc.encoder.printable import jsonable
    from enc.launcher.watch.run_state import last_checkpoint
    from enc.launcher.watch.text import status_text

    files = _find(run)
    state, problem = _look(files)
    state.checkpoint, state.passed_over = last_checkpoint(files.dir, time.time())
    if as_json:
        if problem:
            say(f"Note: {problem}")
        typer.echo(json.dumps(jsonable(asdict(state)), indent=1, allow_nan=False))
    else:
        state.run = _here(files.dir)
        typer.echo(status_text(state, problem))


def list_runs(
    folder: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Where to look, three levels deep; by default here.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the runs at or below a folder, newest first: state, step, loss, when last heard of, SLURM job."""
    from enc.encoder.errors import UsageError
    from enc.encoder.printable import jsonable
    from enc.launcher.run_folder.find import find_runs
    from enc.launcher.watch.run_state import OVER, judge, read_files
    from enc.launcher.watch.text import runs_text

    place = folder or Path.cwd()
    if not place.is_dir():
        raise UsageError(f"There is no folder {place}.")
    runs = [read_files(run, brief=True) for run in find_runs(place)]
    jobs, problem = _ask_slurm([job for files in runs if files.history.status not in OVER for job in files.jobs])
    states = [judge(files, jobs, time.time()) for files in runs]
    if problem:
        say(f"Note: {problem}")
    if as_json:
        typer.echo(json.dumps(jsonable([asdict(state) for state in states]), indent=1, allow_nan=False))
    elif states:
        typer.echo(runs_text([(_name(files.dir, place), state) for files, state in zip(runs, states, strict=True)]))
    else:
        say(f"There is no run in {place} or three levels below it.")


def logs(
    run: RunArgument = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the run is over, from attempt to attempt.")
    ] = False,
    rank: Annotated[int | None, typer.Option("--rank", metavar="R", min=0, help="All output of this rank.")] = None,
    attempt: Annotated[
        int | None, typer.Option("--attempt", metavar="N", min=1, help="An attempt; by default the newest.")
    ] = None,
    lines: Annotated[
        int | None, typer.Option("-n", "--lines", metavar="LINES", min=0, help="Only the last so many lines.")
    ] = None,
    batch: Annotated[bool, typer.Option("--batch", help="What the job's batch process says of the attempts.")] = False,
) -> None:
    """Show a run's log: what rank 0 says, all output of one rank, or that of the batch process."""
    from enc.launcher.run_folder import logs as run_logs

    files = _find(run)
    chosen = _LogChoice(files.dir, rank, attempt, batch)
    path = chosen.path()
    if path is None and not (follow and _is_active(files)):
        chosen.refuse()
    if follow:
        _follow(chosen, 20 if lines is None else lines)
        return
    assert path is not None
    if chosen.note:
        say(chosen.note)
    reader = run_logs.LogReader(path)
    if lines is not None:
        reader.skip_to_last(lines)
    for line in reader.lines(to_the_end=True):
        typer.echo(line)


def cancel(run: RunArgument = None) -> None:
    """Stop a run for good: it saves its state first and is not started again. Without RUN, the only active run here."""
    from enc.launcher.watch.cancel import cancel_run

    files = _only_active() if run is None else _find(run)
    state, problem = _look(files)
    if problem:
        say(f"Note: {problem}")
    cancel_run(files, state, _here(files.dir), say)


# --- which run -------------------------------------------------------------------------------------------------------


def _find(run: str | None) -> "RunFiles":
    """Return the files of the run that a folder, a job or nothing (the newest) means. Raises UsageError without one."""
    from enc.launcher.run_folder.find import find_run
    from enc.launcher.watch.run_state import read_files

    is_job = run is not None and run.partition("_")[0].isdecimal() and not Path(run).exists()
    return read_files((_run_of_job(str(run)) if is_job else find_run(run)).absolute())


def _run_of_job(job: str) -> Path:
    """Return the run that a SLURM job belongs to: from the events of the runs here, else from SLURM itself."""
    from enc.encoder.errors import UsageError
    from enc.launcher.backends.slurm import commands as slurm
    from enc.launcher.run_folder.find import find_runs
    from enc.launcher.run_folder.read import tail

    def belongs(run: Path) -> bool:
        return f'"job": "{job}"'.encode() in tail(run / "events.jsonl", 2**24)

    if here := next(filter(belongs, find_runs(Path.cwd())), None):
        return here
    try:
        paths = slurm.job_paths(job, _PATIENCE_S)
        asked = f"SLURM knows no run folder of job {job}."
    except UsageError as error:
        paths, asked = [], f"SLURM could not be asked: {_short(error)}"
    for folder in [parent for path in paths for parent in (path, *path.parents[:2])]:
        if (folder / "config.yaml").is_file() and belongs(folder):
            return folder
    for folder in paths[-1:]:  # the working folder
        if found := next(filter(belongs, find_runs(folder)), None):
            return found
    raise UsageError(f"No run in {Path.cwd()} or three levels below it had job {job}. {asked} Name the run folder.")


def _only_active() -> "RunFiles":
    """Return the one run below the working directory that is active. Raises UsageError when there is another number."""
    from enc.encoder.errors import UsageError
    from enc.launcher.run_folder.find import find_runs
    from enc.launcher.watch.run_state import ACTIVE, judge, read_files

    runs = [read_files(run, brief=True) for run in find_runs(Path.cwd())]
    jobs, problem = _ask_slurm([job for files in runs for job in files.jobs])
    active = [files for files in runs if judge(files, jobs, time.time()).state in ACTIVE]
    if len(active) == 1:
        return read_files(active[0].dir)
    names = ", ".join(_name(files.dir, Path.cwd()) for files in active[:5])
    found = (
        f"{len(active)} runs are active here, {names}: name the one to cancel, `enc cancel RUN`."
        if active
        else "No run is active here: there is nothing to cancel. Name a run elsewhere with `enc cancel RUN`."
    )
    raise UsageError(found + (f" {problem}" if problem else ""))


def _name(run: Path, place: Path) -> str:
    """Return a run's path relative to where it was looked for."""
    name = str(run.absolute().relative_to(place.absolute()))
    return run.absolute().name if name == "." else name


def _here(path: Path) -> str:
    """Return a path, relative to the working directory when it lies below."""
    return os.path.relpath(path) if path.absolute().is_relative_to(Path.cwd()) else str(path)


def _look(files: "RunFiles") -> tuple["RunState", str | None]:
    """Judge a run, asking SLURM if it had a job; also return why SLURM could not be asked."""
    from enc.launcher.watch.run_state import judge

    jobs, problem = _ask_slurm(files.jobs)
    return judge(files, jobs, time.time()), problem


def _ask_slurm(jobs: list[str]) -> tuple[dict[str, "Job"] | None, str | None]:
    from enc.encoder.errors import UsageError
    from enc.launcher.backends.slurm import commands as slurm

    if not jobs:
        return {}, None
    if not slurm.is_installed():
        return None, "SLURM is not installed on this machine: this is what the files say."
    try:
        return slurm.find_jobs(jobs, _PATIENCE_S), None
    except UsageError as error:
        return None, f"SLURM could not be asked, this is what the files say. {_short(error)}"


def _short(error: Exception) -> str:
    """Return the last thing that a SLURM command said, which is what went wrong."""
    said = str(error)
    return re.split(r"(?:error|fatal): ", said)[-1].rstrip(".") + "."


# --- logs ------------------------------------------------------------------------------------------------------------


class _LogChoice:
    """Which log the options of `enc logs` mean at this moment."""

    def __init__(self, run_dir: Path, rank: int | None, attempt: int | None, batch: bool) -> None:
        self.run_dir, self.rank, self.attempt, self.batch = run_dir, rank, attempt, batch
        self.note: str | None = None
        self.is_fallback = False

    def path(self) -> Path | None:
        from enc.launcher.run_folder.logs import attempts, batch_log, log_file

        files = self.files()
        self.note, self.is_fallback = None, False
        if self.attempt is not None and self.attempt not in attempts(self.run_dir):
            return None
        if self.batch:
            return batch_log(self.run_dir, next(iter(files.jobs), None))
        found = log_file(self.run_dir, self.attempt or files.attempt, self.rank)
        if found is None and self.rank is None and self.attempt is None:
            found = batch_log(self.run_dir, next(iter(files.jobs), None))
            self.note = (
                f"Rank 0 has said nothing yet; this is the batch process's log, {_here(found)}." if found else None
            )
        elif self.rank == 0 and found is not None and found.name == "console.log":
            self.note = f"Rank 0 of a local run writes to the terminal; this is what it logs, {_here(found)}."
        return found

    def files(self) -> "RunFiles":
        from enc.launcher.watch.run_state import read_files

        return read_files(self.run_dir, brief=True)

    def refuse(self) -> None:
        """Raise UsageError: there is no such log."""
        from enc.encoder.errors import UsageError
        from enc.launcher.run_folder.logs import attempts

        there = attempts(self.run_dir)
        if self.attempt is not None and self.attempt not in there:
            listed = ", ".join(map(str, there)) or "none"
            raise UsageError(
                f"{_here(self.run_dir)} has no log of attempt {self.attempt}. Attempts with logs: {listed}."
            )
        kind = "batch process" if self.batch else "rank 0" if self.rank is None else f"rank {self.rank}"
        raise UsageError(
            f"{_here(self.run_dir)} has no log of its {kind}{' yet' if self.attempt is None else ''}. "
            f"See what it is doing with `enc status {_here(self.run_dir)}`."
        )


def _is_active(files: "RunFiles") -> bool:
    from enc.launcher.watch.run_state import OVER

    return _look(files)[0].state not in OVER


def _follow(chosen: _LogChoice, last_lines: int) -> None:
    """Print a run's log as it comes, until it is over; Ctrl-C ends it."""
    from enc.launcher.run_folder import logs as run_logs

    said: list[str] = []
    shown: list[Path] = []

    def find() -> Path | None:
        path = chosen.path()
        if path is None or (shown and chosen.is_fallback):
            return shown[-1] if shown else None  # until rank 0 of the next attempt speaks
        if chosen.note and chosen.note not in said:
            said.append(chosen.note)
            say(chosen.note)
        shown.append(path)
        del shown[:-1]
        return path

    def announce(path: Path) -> None:
        if chosen.note is None:
            say(f"--- {path.relative_to(chosen.run_dir)}")

    is_over = _Over(chosen)
    try:
        for line in run_logs.follow(find, is_over, last_lines, announce):
            typer.echo(line)
    except KeyboardInterrupt:
        sys.exit(130)
    say(f"--- {is_over.state}")


class _Over:
    """Tells whether the followed run, or the chosen attempt of it, is over, asking SLURM now and then only."""

    def __init__(self, chosen: _LogChoice) -> None:
        self.chosen = chosen
        self.asked: tuple[Any, ...] = ()
        self.asked_at = 0.0
        self.jobs: dict[str, Any] | None = {}
        self.state = ""

    def __call__(self) -> bool:
        from enc.launcher.watch.run_state import OVER, judge

        files = self.chosen.files()
        attempt = self.chosen.attempt
        if attempt is not None and (files.attempt or 0) > attempt:
            self.state = f"attempt {attempt} is over"
            return True
        news = (files.jobs, files.history.status)
        interval_s = _ASK_SLURM_S / 3 if self.state == "stopping" else _ASK_SLURM_S
        if news != self.asked or (self.state not in OVER and time.monotonic() - self.asked_at > interval_s):
            self.jobs, _ = _ask_slurm(files.jobs)
            self.asked, self.asked_at = news, time.monotonic()
        self.state = judge(files, self.jobs, time.time()).state
        return self.state in OVER and not files.lock.held
