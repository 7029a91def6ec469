"""What several commands share: the config argument, overrides, how warnings are said."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from enc.encoder.config import RunConfig

OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
ConfigArgument = Annotated[
    str, typer.Argument(metavar="CFG", help="YAML file or recipe name. Any key can follow: section.key=value")
]


def say(text: str) -> None:
    """Print prose; results go to stdout, prose to stderr."""
    typer.echo(text, err=True)


def load(name: str, words: list[str], more: dict[str, Any] | None = None) -> "RunConfig":
    """Load a config with the overrides among `words`, and say its warnings."""
    from enc.encoder.config_load import load_config, parse_overrides

    loaded = load_config(name, parse_overrides(words) | (more or {}))
    for warning in loaded.warnings:
        say(f"Note: {warning}")
    return loaded.config
