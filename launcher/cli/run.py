"""`enc launch`, `enc resume`, `enc preprocess`, `enc eval`, `enc report`."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from enc.encoder.errors import UsageError
from enc.encoder.tasks import TASKS
from enc.launcher import api
from enc.launcher.cli import complete
from enc.launcher.cli.groups import HintedGroup, KeyedCommand
from enc.launcher.cli.options import (
    OVERRIDES,
    ConfigArgument,
    JsonOption,
    NprocOption,
    SiteOption,
    checkpoint_argument,
    load,
    say,
)

if TYPE_CHECKING:
    from enc.encoder.config.schema import RunConfig

_ANY_KEY = "Any config key can be set: trainer.max_steps=100 or --trainer.max_steps 100."

_EXAMPLES = "Examples: enc launch pretrain quickstart --dry-run; enc launch pretrain my.yaml --nproc 8 seed=2"

launch_app = typer.Typer(cls=HintedGroup, help="Start a run.", no_args_is_help=True)
eval_app = typer.Typer(cls=HintedGroup, help="Evaluate a checkpoint.", no_args_is_help=True)

NodesOption = Annotated[int | None, typer.Option("--nodes", metavar="N", help="Machines of a SLURM cluster.")]
PartitionOption = Annotated[str | None, typer.Option("--partition", metavar="NAME", help="SLURM partition.")]
TimeOption = Annotated[str | None, typer.Option("--time", metavar="LIMIT", help="Time limit of a job: D-HH:MM:SS.")]
RunOption = Annotated[
    str | None,
    typer.Option(
        "--run", metavar="DIR", help="Run folder; by default the newest one here.", autocompletion=complete.runs
    ),
]


def launch_task(
    context: typer.Context,
    config: ConfigArgument,
    nproc: NprocOption = None,
    nodes: NodesOption = None,
    partition: PartitionOption = None,
    time_limit: TimeOption = None,
    site: SiteOption = None,
    after: Annotated[str | None, typer.Option("--after", metavar="JOB", help="Start when that job has ended.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and the files, start nothing.")] = False,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Try a few steps here under simulated trouble, submit nothing.")
    ] = False,
    trouble: Annotated[
        str, typer.Option("--trouble", metavar="A,B", help="What a rehearsal is hit by; all by default.")
    ] = "preempt,lost-rank,time-limit,full-disk,hang",
    allow_change: Annotated[bool, typer.Option("--allow-change", help="Resume although the config changed.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Start a run of a task; the command's own name says of which."""
    chained = {} if after is None else {"launch.slurm.after": after}
    placed = _placed(nproc, nodes, partition, time_limit, site)
    loaded = load(config, context, placed | chained | _task_of(context))
    _refuse_another_task(loaded, context)
    if dry_run:
        _show_plan(loaded, as_json)
    elif rehearse:
        _rehearse(loaded, trouble.split(","), as_json)
    else:
        _launch(loaded, allow_change, as_json)


for _task in TASKS.values():
    launch_app.command(
        _task.command, cls=KeyedCommand, context_settings=OVERRIDES, help=f"{_task.help} {_ANY_KEY}", epilog=_EXAMPLES
    )(launch_task)


def _task_of(context: typer.Context) -> dict[str, Any]:
    """Return the override that the name of the command stands for; `pretrain` leaves the word to the config."""
    named = [name for name, task in TASKS.items() if task.command == context.info_name]
    return {} if named == ["pretraining"] else {"task": named[0]}


def _refuse_another_task(config: "RunConfig", context: typer.Context) -> None:
    """Raise UsageError when the command is that of another task than the config's."""
    command = TASKS[config.task].command
    if command != context.info_name:
        raise UsageError(f"The config's task is {config.task}. Start it with `enc launch {command}`.")


def _placed(
    nproc: int | None, nodes: int | None, partition: str | None, time_limit: str | None, site: str | None
) -> dict[str, Any]:
    """Return the overrides that the options about machines stand for."""
    given = {
        "launch.nproc_per_node": nproc, "launch.nodes": nodes, "launch.slurm.partition": partition,
        "launch.slurm.time": time_limit, "launch.site": site,
    }  # fmt: skip
    return {key: value for key, value in given.items() if value is not None}


def _show_plan(config: "RunConfig", as_json: bool) -> None:
    from enc.encoder.text_table import table
    from enc.launcher.backends.registry import choose_backend, current_job
    from enc.launcher.checks.before_launch import check_before
    from enc.launcher.machine.facts import look
    from enc.launcher.planning.plan import plan_run
    from enc.launcher.planning.plan_text import plan_notes, plan_table
    from enc.launcher.planning.ranks import with_assumed_gpus
    from enc.launcher.planning.render import render

    config, backend = choose_backend(config)
    facts = look(current_job(os.environ))
    plan = plan_run(with_assumed_gpus(backend.defaults(config, say), say), facts)
    scripts = backend.render(plan)
    files = render(plan) | scripts
    for note in plan_notes(plan):
        say(note)
    if as_json:
        typer.echo(json.dumps({"plan": plan.as_dict(), "files": files}, indent=1))
    else:
        typer.echo(table([*plan_table(plan), *(("writes", str(plan.run_dir / name)) for name in files)]))
        for script in scripts.values():
            typer.echo(f"\n{script}", nl=False)
    check_before(plan, facts, backend.checks(plan, facts) if backend.is_installed() else [], say)


def _rehearse(config: "RunConfig", troubles: list[str], as_json: bool) -> None:
    from dataclasses import asdict

    from enc.launcher.backends.rehearsal import TROUBLES, rehearse
    from enc.launcher.machine.facts import look

    verdict = rehearse(config, look(), troubles, say)
    if as_json:
        acts = [asdict(act) for act in verdict.acts]
        typer.echo(json.dumps({"survived": verdict.survived, "same_bytes": verdict.same_bytes, "troubles": acts}))
    else:
        for act in verdict.acts:
            went_on = "did not go on" if act.went_on_from is None else f"went on from step {act.went_on_from}"
            typer.echo(f"step {act.at_step:>3}  {TROUBLES[act.trouble]}: {went_on}")
        end = (
            "the same bytes as the undisturbed run" if verdict.same_bytes else "OTHER weights than the undisturbed run"
        )
        typer.echo(f"Survived, with {end}." if verdict.finished else f"It did not survive; see {verdict.folder}.")
    sys.exit(0 if verdict.survived else 3)


def _launch(config: "RunConfig", allow_change: bool, as_json: bool = False) -> None:
    started = api.launch(config, allow_change, say)
    if started.job is None:
        sys.exit(started.exit_code)
    typer.echo(json.dumps({"job": started.job, "run_dir": str(started.run_dir)}) if as_json else started.job)


def resume(
    context: typer.Context,
    which: Annotated[
        str,
        typer.Argument(
            metavar="WHICH", help="latest, best, a step, or a checkpoint folder.", autocompletion=complete.resumable
        ),
    ],
    run: RunOption = None,
    nproc: NprocOption = None,
    nodes: NodesOption = None,
    partition: PartitionOption = None,
    time_limit: TimeOption = None,
    site: SiteOption = None,
    allow_change: Annotated[bool, typer.Option("--allow-change", help="Go on although the config changed.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Go on with a run from a checkpoint, exactly where it was. Config keys can follow, as with launch.

    A run of SLURM goes back to SLURM, on other numbers of nodes if you like; launch.scheduler=local keeps it here.
    """
    from enc.launcher.planning.resume import moved_store
    from enc.launcher.run_folder.find import find_run

    run_dir = find_run(run)
    more: dict[str, Any] = {"trainer.output_dir": str(run_dir), "trainer.resume_from_checkpoint": which}
    placed = _placed(nproc, nodes, partition, time_limit, site)
    if placed.keys() - {"launch.nproc_per_node"} and not any("launch.scheduler" in word for word in context.args):
        placed["launch.scheduler"] = "auto"
    if not any("dataset.path" in word for word in context.args):
        more |= moved_store(run_dir)
    config = load(str(run_dir / "config.yaml"), context, more | placed)
    _launch(config, allow_change, as_json)


def preprocess(context: typer.Context, config: ConfigArgument) -> None:
    """Tokenise the text of a config into a token store; print the store's path."""
    typer.echo(str(api.preprocess(load(config, context), say)))


@eval_app.command("mlm")
def eval_mlm(
    checkpoint: Annotated[
        str,
        checkpoint_argument("CKPT", "Checkpoint folder, RUN (its latest) or RUN/best."),
    ],
    store: Annotated[
        str | None, typer.Option("--store", metavar="DIR", help="Another token store to evaluate on.")
    ] = None,
    split: Annotated[str, typer.Option("--split", help="Split of the token store.")] = "eval",
    max_batches: Annotated[
        int | None, typer.Option("--max-batches", metavar="N", help="Evaluate at most so many.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Loss, accuracy and perplexity of masked tokens, with fixed masks."""
    from enc.encoder.run.evaluate import evaluate_checkpoint
    from enc.launcher.cli.ckpt import checkpoint_folder

    metrics = evaluate_checkpoint(checkpoint_folder(checkpoint), store, split, max_batches)
    if as_json:
        typer.echo(json.dumps(metrics))
    else:
        typer.echo("\n".join(f"{name:<16} {value:.6g}" for name, value in metrics.items()))


def report(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN]...",
            help="Run folders, side by side; by default the newest one here.",
            autocompletion=complete.runs,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="By default report.html in RUN; of several runs comparison.html.",
        ),
    ] = None,
) -> None:
    """Write one HTML page on a run, or on several side by side: curves, evaluations, settings, environment."""
    from enc.launcher.run_folder.find import find_run
    from enc.launcher.watch.report import write_report

    found = [find_run(run) for run in runs] if runs else [find_run(None)]
    default = found[0] / "report.html" if len(found) == 1 else Path("comparison.html")
    typer.echo(str(write_report(found, output or default)))
