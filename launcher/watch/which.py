"""Which run is meant: a folder, a job, or the only one here; and what it is called here."""

import time
from pathlib import Path

from enc.encoder.errors import UsageError
from enc.encoder.events import EVENTS_FILE
from enc.launcher.backends.registry import owner_of
from enc.launcher.run_folder.find import find_run, find_runs
from enc.launcher.run_folder.read import tail
from enc.launcher.watch.ask import PATIENCE_S, Answers, ask_schedulers, last_words
from enc.launcher.watch.run_state import ACTIVE, RunFiles, RunState, read_files, state_of


def files_of(run: str | None) -> RunFiles:
    """Return the files of the run that a folder, a job or nothing (the newest) means. Raises UsageError without one."""
    is_job = run is not None and owner_of(run) is not None and not Path(run).exists()
    return read_files((_run_of_job(str(run)) if is_job else find_run(run)).absolute())


def state_now(files: RunFiles) -> tuple[RunState, str | None]:
    """Say what a run is doing, asking the scheduler if it had a job; also return why that could not be asked."""
    answers = ask_schedulers(files.jobs)
    return state_of(files, answers.about(files), time.time()), answers.problem


def states_now(runs: list[RunFiles], answers: Answers) -> list[RunState]:
    """Say what several runs are doing."""
    return [state_of(files, answers.about(files), time.time()) for files in runs]


def only_active() -> RunFiles:
    """Return the one run below the working directory that is active. Raises UsageError when there is another number."""
    runs = [read_files(run, brief=True) for run in find_runs(Path.cwd())]
    answers = ask_schedulers([job for files in runs for job in files.jobs])
    states = states_now(runs, answers)
    active = [files for files, state in zip(runs, states, strict=True) if state.state in ACTIVE]
    if len(active) == 1:
        return read_files(active[0].dir)
    names = ", ".join(name_below(files.dir, Path.cwd()) for files in active[:5])
    found = (
        f"{len(active)} runs are active here, {names}: name the one to cancel, `enc cancel RUN`."
        if active
        else "No run is active here: there is nothing to cancel. Name a run elsewhere with `enc cancel RUN`."
    )
    raise UsageError(found + (f" {answers.problem}" if answers.problem else ""))


def _run_of_job(job: str) -> Path:
    """Return the run that a job belongs to: from the events of the runs here, else from its scheduler."""

    def had_job(run: Path) -> bool:
        return f'"job": "{job}"'.encode() in tail(run / EVENTS_FILE, 2**24)

    if here := next(filter(had_job, find_runs(Path.cwd())), None):
        return here
    folders, problem = _folders_of(job)
    for folder in folders:
        if (folder / "config.yaml").is_file() and had_job(folder):
            return folder
    for folder in folders[-1:]:  # the working folder
        if found := next(filter(had_job, find_runs(folder)), None):
            return found
    raise UsageError(f"No run in {Path.cwd()} or three levels below it had job {job}. {problem} Name the run folder.")


def _folders_of(job: str) -> tuple[list[Path], str]:
    """Return folders in which the run of a job may be, and what to say when it is in none."""
    backend = owner_of(job)
    assert backend is not None
    try:
        return backend.folders_of_job(job, PATIENCE_S), f"{backend.title} knows no run folder of job {job}."
    except UsageError as error:
        return [], f"{backend.title} could not be asked: {last_words(error)}"


def name_below(run: Path, place: Path) -> str:
    """Return a run's path relative to where it was looked for."""
    name = str(run.absolute().relative_to(place.absolute()))
    return run.absolute().name if name == "." else name
