"""`enc status`, `enc logs`, `enc ls`, `enc cancel`: watching runs and stopping them."""

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from enc.encoder.printable import name_here
from enc.launcher.cli import complete
from enc.launcher.cli.options import JsonOption, say

if TYPE_CHECKING:
    from enc.launcher.watch.follow import LogChoice

RunArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="RUN", help="Run folder or SLURM job; by default the newest run here.", autocompletion=complete.runs
    ),
]


def status(run: RunArgument = None, as_json: JsonOption = False) -> None:
    """Show what a run is doing: its state, step, loss, speed, time left, last checkpoint, why it last stopped."""
    from enc.launcher.watch.run_state import last_checkpoint
    from enc.launcher.watch.text import as_json as json_of
    from enc.launcher.watch.text import status_text
    from enc.launcher.watch.which import files_of, state_now

    files = files_of(run)
    state, problem = state_now(files)
    state.checkpoint, state.passed_over = last_checkpoint(files.dir, time.time())
    if as_json:
        if problem:
            say(f"Note: {problem}")
        typer.echo(json.dumps(json_of(state), indent=1, allow_nan=False))
    else:
        state.run = name_here(files.dir)
        typer.echo(status_text(state, problem))


def list_runs(
    folder: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Where to look, three levels deep; by default here.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the runs at or below a folder, newest first: state, step, loss, when last heard of, SLURM job."""
    from enc.encoder.errors import UsageError
    from enc.launcher.run_folder.find import find_runs
    from enc.launcher.watch.ask import ask_schedulers
    from enc.launcher.watch.run_state import OVER, read_files
    from enc.launcher.watch.text import as_json as json_of
    from enc.launcher.watch.text import runs_text
    from enc.launcher.watch.which import name_below, states_now

    place = folder or Path.cwd()
    if not place.is_dir():
        raise UsageError(f"There is no folder {place}.")
    runs = [read_files(run, brief=True) for run in find_runs(place)]
    answers = ask_schedulers([job for files in runs if files.history.status not in OVER for job in files.jobs])
    states = states_now(runs, answers)
    if answers.problem:
        say(f"Note: {answers.problem}")
    if as_json:
        typer.echo(json.dumps([json_of(state) for state in states], indent=1, allow_nan=False))
    elif states:
        names = [name_below(files.dir, place) for files in runs]
        typer.echo(runs_text(list(zip(names, states, strict=True))))
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
    from enc.launcher.watch.follow import LogChoice
    from enc.launcher.watch.run_state import OVER
    from enc.launcher.watch.which import files_of, state_now

    files = files_of(run)
    chosen = LogChoice(files.dir, rank, attempt, batch)
    path = chosen.path()
    if path is None and not (follow and state_now(files)[0].state not in OVER):
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
    from enc.launcher.watch.which import files_of, only_active, state_now

    files = only_active() if run is None else files_of(run)
    state, problem = state_now(files)
    if problem:
        say(f"Note: {problem}")
    cancel_run(files, state, name_here(files.dir), say)


def _follow(chosen: "LogChoice", last_lines: int) -> None:
    """Print a run's log as it comes, until it is over; Ctrl-C ends it."""
    from enc.launcher.run_folder import logs as run_logs
    from enc.launcher.watch.follow import FollowedRun

    notes: list[str] = []

    def find() -> Path | None:
        path = chosen.path()
        if path is not None and chosen.note and chosen.note not in notes:
            notes.append(chosen.note)
            say(chosen.note)
        return path

    def announce(path: Path) -> None:
        if chosen.note is None:
            say(f"--- {path.relative_to(chosen.run_dir)}")

    followed = FollowedRun(chosen)
    try:
        for line in run_logs.follow(find, followed.is_over, last_lines, announce):
            typer.echo(line)
    except KeyboardInterrupt:
        sys.exit(130)
    say(f"--- {followed.state}")
