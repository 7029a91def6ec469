"""`enc config`: check, show, copy, schema, recipes, sites, from-mpnet."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from enc.encoder.printable import printable
from enc.launcher.cli import complete
from enc.launcher.cli.groups import HintedGroup, KeyedCommand
from enc.launcher.cli.options import OVERRIDES, ConfigArgument, JsonOption, load, say

app = typer.Typer(cls=HintedGroup, help="Look at configs without running anything.", no_args_is_help=True)


@app.command(cls=KeyedCommand, context_settings=OVERRIDES)
def check(context: typer.Context, config: ConfigArgument) -> None:
    """Check a config and report every problem of it at once, and whether its run could start from this machine."""
    from enc.launcher.backends.registry import choose_backend, current_job
    from enc.launcher.checks.before_launch import check_before
    from enc.launcher.machine.facts import look
    from enc.launcher.planning.plan import plan_run
    from enc.launcher.planning.plan_text import plan_notes
    from enc.launcher.planning.ranks import with_assumed_gpus

    chosen, _ = choose_backend(load(config, context))
    facts = look(current_job(os.environ))
    plan = plan_run(with_assumed_gpus(chosen, say), facts)
    for note in plan_notes(plan):
        say(note)
    check_before(plan, facts, [], say)
    typer.echo(f"{config}: no problems.")


@app.command(cls=KeyedCommand, context_settings=OVERRIDES)
def show(
    context: typer.Context,
    config: ConfigArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print a config with all defaults, variables and overrides filled in."""
    loaded = load(config, context)
    typer.echo(json.dumps(loaded.model_dump(mode="json"), indent=1) if as_json else loaded.to_yaml(), nl=as_json)


@app.command()
def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the reference page instead.")] = False,
) -> None:
    """Print the JSON schema of a config, for editors."""
    from enc.encoder.config.schema import RunConfig
    from enc.launcher.cli.config_page import configuration_page

    typer.echo(
        configuration_page() if markdown else json.dumps(RunConfig.model_json_schema(), indent=1), nl=not markdown
    )


@app.command()
def recipes() -> None:
    """List the built-in configs: name and what each is for."""
    from enc.encoder.config.sites import RECIPES

    for path in sorted(RECIPES.glob("*.yaml")):
        typer.echo(f"{path.stem:<14} {path.read_text().splitlines()[0].removeprefix('# ')}")


@app.command(epilog="Example: enc config copy quickstart my.yaml")
def copy(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE", help="Built-in config: `enc config recipes` lists them.", autocompletion=complete.recipes
        ),
    ],
    path: Annotated[Path, typer.Argument(metavar="FILE", help="New YAML file.")],
) -> None:
    """Write a built-in config to a file of your own, comments and all; print its path."""
    from enc.encoder.config.sites import RECIPES
    from enc.encoder.errors import UsageError
    from enc.encoder.spelling import did_you_mean

    names = sorted(file.stem for file in RECIPES.glob("*.yaml"))
    if recipe not in names:
        hint = did_you_mean(recipe, names) or f"; there are {', '.join(names)}."
        raise UsageError(f"There is no recipe {printable(recipe)}{hint}")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write((RECIPES / f"{recipe}.yaml").read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{printable(path)} cannot be written: {error.strerror}. Name another file.") from None
    say(f"Set dataset.path in it to your text, then check it: enc config check {printable(path)}")
    typer.echo(str(path))


@app.command()
def sites(as_json: JsonOption = False) -> None:
    """List the site profiles: name, what each is for, and where an own one lies."""
    from enc.encoder.config.sites import SITES, site_files

    found = [(name, _first_comment(path), path) for name, path in sorted(site_files().items())]
    if as_json:
        typer.echo(json.dumps([{"name": n, "text": text, "path": str(path)} for n, text, path in found], indent=1))
        return
    for name, text, path in found:
        typer.echo(f"{name:<14} {text}{'' if path.parent == SITES else f' [{path}]'}")


@app.command("from-mpnet", context_settings={"ignore_unknown_options": True})
def from_mpnet(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="-- FLAGS", help="What follows `pretrain-mpnet` in annotated-mpnet.")
    ] = None,
) -> None:
    """Print the config that a command line of annotated-mpnet stands for."""
    from enc.tools.annotated_mpnet.flags import config_yaml, notes, read

    command = read(words or [])
    for note in notes(command):
        say(f"Note: {note}")
    typer.echo(config_yaml(command), nl=False)


def _first_comment(path: Path) -> str:
    """Return what the first line of a profile says, or nothing where it cannot be read."""
    try:
        first, _, _ = path.read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return "(cannot be read)"
    return printable(first.removeprefix("#").strip()) if first.startswith("#") else ""
