"""`enc launch`, `enc resume`, `enc preprocess`, `enc eval`, `enc report`."""

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from enc.launcher.options import OVERRIDES, ConfigArgument, JsonOption, NprocOption, load, ranks_given, say

if TYPE_CHECKING:
    from enc.encoder.config import RunConfig

launch_app = typer.Typer(help="Start a run.", no_args_is_help=True)
eval_app = typer.Typer(help="Evaluate a checkpoint.", no_args_is_help=True)

RunOption = Annotated[
    str | None, typer.Option("--run", metavar="DIR", help="Run folder; by default the newest one here.")
]


@launch_app.command("pretrain", context_settings=OVERRIDES)
def launch_pretrain(
    context: typer.Context,
    config: ConfigArgument,
    nproc: NprocOption = None,
    nodes: Annotated[int | None, typer.Option("--nodes", metavar="N", help="Machines.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and the files, start nothing.")] = False,
    allow_change: Annotated[bool, typer.Option("--allow-change", help="Resume although the config changed.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Pretrain an encoder. Any config key can be set: trainer.max_steps=100 or --trainer.max_steps 100."""
    machines = {} if nodes is None else {"launch.nodes": nodes}
    loaded = load(config, context, {**machines, **ranks_given(nproc)})
    if dry_run:
        _show_plan(loaded, as_json)
    else:
        _launch(loaded, allow_change)


def _show_plan(config: "RunConfig", as_json: bool) -> None:
    from enc.encoder.metrics import table
    from enc.launcher.plan import make_plan, plan_notes, plan_table, render

    plan = make_plan(config)
    files = render(plan)
    for note in plan_notes(plan):
        say(note)
    if as_json:
        typer.echo(json.dumps({"plan": plan.as_dict(), "files": files}, indent=1))
        return
    typer.echo(table([*plan_table(plan), *(("writes", str(plan.run_dir / name)) for name in files)]))


def _launch(config: "RunConfig", allow_change: bool) -> None:
    from enc.launcher.launch import launch

    sys.exit(launch(config, allow_change, _preprocess, say))


def resume(
    context: typer.Context,
    which: Annotated[str, typer.Argument(metavar="WHICH", help="latest, a step, or a checkpoint folder.")],
    run: RunOption = None,
    nproc: NprocOption = None,
    allow_change: Annotated[bool, typer.Option("--allow-change", help="Go on although the config changed.")] = False,
) -> None:
    """Go on with a run from a checkpoint, exactly where it was. Config keys can follow, as with launch."""
    from enc.launcher.run_folder import find_run

    run_dir = find_run(run)
    more = {"trainer.output_dir": str(run_dir), "trainer.resume_from_checkpoint": which}
    _launch(load(str(run_dir / "config.yaml"), context, {**more, **ranks_given(nproc)}), allow_change)


def preprocess(context: typer.Context, config: ConfigArgument) -> None:
    """Tokenise the text of a config into a token store; print the store's path."""
    typer.echo(str(_preprocess(load(config, context))))


def _preprocess(config: "RunConfig") -> Any:
    """Make the token store of a config, with a progress bar; a finished one is reused."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from enc.encoder.data.preprocess import preprocess, store_path

    existed = (store_path(config.dataset) / "manifest.json").is_file()
    columns = (TextColumn("Tokenising"), BarColumn(), TextColumn("{task.fields[tokens]}"), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None, tokens="", visible=not existed)

        def show(done: int, total: int | None, tokens: int) -> None:
            progress.update(task, completed=done, total=total, tokens=f"{tokens:,} tokens")

        path = preprocess(config.dataset, config.tokenizer, config.seed, show)
    splits = json.loads((path / "manifest.json").read_text())["splits"]
    counts = "; ".join(f"{name} {s['documents']:,} documents, {s['tokens']:,} tokens" for name, s in splits.items())
    say(f"{'Using the token store' if existed else 'Made the token store'} {path}: {counts}.")
    return path


@eval_app.command("mlm")
def eval_mlm(
    checkpoint: Annotated[str, typer.Argument(metavar="CKPT", help="Checkpoint folder, or a run folder (its latest).")],
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
    from enc.encoder.evaluate.checkpoint import evaluate_checkpoint
    from enc.launcher.cli_ckpt import checkpoint_folder

    metrics = evaluate_checkpoint(checkpoint_folder(checkpoint), store, split, max_batches)
    if as_json:
        typer.echo(json.dumps(metrics))
    else:
        typer.echo("\n".join(f"{name:<16} {value:.6g}" for name, value in metrics.items()))


def report(
    run: Annotated[
        str | None, typer.Argument(metavar="RUN", help="Run folder; by default the newest one here.")
    ] = None,
) -> None:
    """Write one HTML page with a run's curves, events and settings; print its path."""
    from enc.launcher.report import write_report
    from enc.launcher.run_folder import find_run

    typer.echo(str(write_report(find_run(run))))
