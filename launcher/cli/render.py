"""`enc render`: the job script of a run, and the files that its engine reads."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from enc.encoder.errors import UsageError
from enc.encoder.events import Event, append_event
from enc.encoder.files import replace_atomically
from enc.launcher.cli.options import (
    OVERRIDES,
    ConfigArgument,
    JsonOption,
    NprocOption,
    SiteOption,
    load,
    ranks_given,
    say,
)

render_app = typer.Typer(help="Print a job script or an engine's settings file.", no_args_is_help=True)

NodesOption = Annotated[int, typer.Option("--nodes", metavar="N", min=1, help="Machines.")]
ToOption = Annotated[
    Path | None, typer.Option("--to", metavar="DIR", help="Write the file there and print its path instead.")
]


@render_app.command("deepspeed", context_settings=OVERRIDES)
def render_deepspeed(
    context: typer.Context,
    config: ConfigArgument,
    nproc: NprocOption = None,
    nodes: NodesOption = 1,
    to: ToOption = None,
) -> None:
    """Print the JSON that DeepSpeed is given in a run of this config."""
    _render("deepspeed", context, config, nproc, nodes, to)


@render_app.command("fsdp", context_settings=OVERRIDES)
def render_fsdp(
    context: typer.Context,
    config: ConfigArgument,
    nproc: NprocOption = None,
    nodes: NodesOption = 1,
    to: ToOption = None,
) -> None:
    """Print the JSON that FSDP is given in a run of this config."""
    _render("fsdp", context, config, nproc, nodes, to)


def _render(engine: str, context: typer.Context, config: str, nproc: int | None, nodes: int, to: Path | None) -> None:
    from enc.encoder.engine.settings import engine_files
    from enc.encoder.sizing.batch_split import split_batch
    from enc.launcher.machine.facts import look
    from enc.launcher.planning.ranks import ranks_per_node

    loaded = load(config, context, {"parallel.engine": engine, **ranks_given(nproc)})
    split = split_batch(loaded.trainer, nodes * ranks_per_node(loaded, look()))
    ((name, text),) = engine_files(loaded, split).items()
    if to is None:
        typer.echo(text, nl=False)
        return
    _write(to, {name: text})
    typer.echo(str(to / name))


def _write(folder: Path, files: dict[str, str]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        names = ", ".join(files)
        raise UsageError(f"--to {folder}: {names} cannot be written there ({reason}); name another folder.") from None


@render_app.command("slurm", context_settings=OVERRIDES)
def render_slurm(
    context: typer.Context,
    config: ConfigArgument,
    nproc: NprocOption = None,
    nodes: Annotated[int | None, typer.Option("--nodes", metavar="N", min=1, help="Machines.")] = None,
    site: SiteOption = None,
    to: Annotated[
        Path | None,
        typer.Option("--to", metavar="DIR", help="Write script and config there, ready to submit; print its path."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Print the job script of a run. It needs no SLURM: sbatch --parsable "$(enc render slurm CFG --to DIR)"."""
    from enc.launcher.backends.queue import submitted_config
    from enc.launcher.backends.registry import current_job
    from enc.launcher.backends.slurm.script import SCRIPT_FILE, script_of
    from enc.launcher.machine.facts import look
    from enc.launcher.planning.plan import plan_run
    from enc.launcher.planning.plan_text import plan_notes
    from enc.launcher.planning.ranks import with_assumed_gpus
    from enc.launcher.run_folder.snapshot import snapshot_code

    given = {"launch.nodes": nodes, "launch.site": site, "launch.nproc_per_node": nproc}
    loaded = load(config, context, {key: value for key, value in given.items() if value is not None})
    submitted = with_assumed_gpus(loaded.changed({"launch.scheduler": "slurm"}), say)
    plan = plan_run(submitted, look(current_job(os.environ)))
    script = script_of(plan)
    settings = {"config.yaml": submitted_config(plan).to_yaml(), **plan.engine_files}
    for note in plan_notes(plan):
        say(note)
    if not plan.store_ready:
        say(f"Note: {plan.store} does not exist yet: the job makes it, or `enc preprocess` does before.")
    if to is not None:
        _make_run_folder(plan.run_dir, {SCRIPT_FILE: script, **settings})  # the job submits its successor from there
        if plan.config.launch.snapshot_code:
            snapshot_code(plan.run_dir)
        _write(to, {SCRIPT_FILE: script, **settings})
        say(f"Wrote {', '.join([SCRIPT_FILE, *settings])} to {to}. The job's run folder is {plan.run_dir}.")
    if as_json:
        launch, names = plan.config.launch, [SCRIPT_FILE, *settings]
        written = None if to is None else {name: str(to / name) for name in names}
        numbers = {"nodes": launch.num_nodes, "nproc_per_node": launch.nproc_per_node}
        typer.echo(json.dumps({"run_dir": str(plan.run_dir), **numbers, "files": written, "script": script}, indent=1))
    else:
        typer.echo(script if to is None else str(to / SCRIPT_FILE), nl=to is not None)


def _make_run_folder(run_dir: Path, files: dict[str, str]) -> None:
    """Write the run folder that a job starts in: SLURM makes no folder for its log, and the run is its config.

    Raises UsageError when the folder holds a run already.
    """
    from enc.launcher.backends.registry import find_jobs
    from enc.launcher.run_folder.lock import RunLock
    from enc.launcher.run_folder.records import refuse_older_run

    lock = RunLock(run_dir, find_jobs)
    try:
        refuse_older_run(run_dir)
        (run_dir / "logs").mkdir(exist_ok=True)
        for name, text in files.items():
            replace_atomically(run_dir / name, text)
        append_event(run_dir, Event.RENDERED)
    finally:
        lock.release(remove_if_created=True)
