"""What several commands share: the config argument, overrides, how warnings are said."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from enc.encoder.errors import UsageError
from enc.encoder.spelling import did_you_mean
from enc.encoder.text_table import fitted
from enc.launcher import api
from enc.launcher.cli import complete

if TYPE_CHECKING:
    from enc.encoder.config.schema import RunConfig

OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
ConfigArgument = Annotated[
    str,
    typer.Argument(
        metavar="CFG",
        help="YAML file or recipe name. Any key can follow: section.key=value",
        autocompletion=complete.configs,
    ),
]
NprocOption = Annotated[
    int | None,
    typer.Option("--nproc", metavar="N", help="Processes on a machine, one a GPU; also --gpus-per-node."),
]
SiteOption = Annotated[
    str | None, typer.Option("--site", metavar="NAME", help="Site profile (`enc config sites`) or a file of one.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def checkpoint_argument(metavar: str, help_text: str) -> Any:
    """Return an argument that names a checkpoint, which the shell completes."""
    return typer.Argument(metavar=metavar, help=help_text, autocompletion=complete.checkpoints)


def say(text: str) -> None:
    """Print prose; results go to stdout, prose to stderr."""
    typer.echo(fitted(text, sys.stderr), err=True)


def load(name: str, context: typer.Context, more: dict[str, Any] | None = None) -> "RunConfig":
    """Load a config with the overrides among the command's words, and say its warnings."""
    return api.load_config(name, overrides_among(context) | (more or {}), say)


def load_defaults(context: typer.Context, keys: dict[str, Any]) -> "RunConfig":
    """Load the default config with `keys` and, over them, the overrides among the command's words."""
    from enc.encoder.config.load import load_text

    return api.with_notes(load_text("{}", "the default config", keys | overrides_among(context)), say)


def overrides_among(context: typer.Context) -> dict[str, Any]:
    """Return the overrides among the command's words."""
    from enc.encoder.config.overrides import parse_overrides

    _refuse_unknown_options(context)
    return parse_overrides(context.args)


def ranks_given(nproc: int | None) -> dict[str, Any]:
    """Return the override that `--nproc` stands for."""
    return {} if nproc is None else {"launch.nproc_per_node": nproc}


def _refuse_unknown_options(context: typer.Context) -> None:
    """Raise UsageError on a mistyped option, which would otherwise be taken for an override."""
    from enc.encoder.config.old_names import top_level_names

    options = [option for parameter in context.command.params for option in parameter.opts if option.startswith("--")]
    for word in context.args:
        name = word.partition("=")[0]
        if word.startswith("--") and "." not in name and name[2:] not in top_level_names():
            hint = did_you_mean(name, options) or "."
            raise UsageError(f"{name} is neither an option of this command nor a key of a config{hint}")
