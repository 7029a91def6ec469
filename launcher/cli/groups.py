"""The groups of commands: in which order they are listed, and what is said to who types a name of another tool."""

from types import SimpleNamespace
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from enc.launcher.cli import complete

_PRETRAIN, _COPY, _CHECK = "enc launch pretrain CFG", "enc config copy RECIPE my.yaml", "enc config check CFG"
MEANT = {
    **dict.fromkeys(("train", "pretrain", "pretraining", "run", "start", "submit", "sbatch", "mlm"), _PRETRAIN),
    **dict.fromkeys(("tokenize", "tokenise", "tokenize_dataset", "tokenize-dataset", "prepare"), "enc preprocess CFG"),
    **dict.fromkeys(("evaluate", "test", "loss"), "enc eval mlm RUN"),
    **dict.fromkeys(("init", "new", "cp", "copy"), _COPY),
    **dict.fromkeys(("validate", "check"), _CHECK),
    **dict.fromkeys(("estimate", "estimate-memory", "memory"), "enc plan CFG"),
    **dict.fromkeys(("env", "info", "diagnose"), "enc doctor"),
    **dict.fromkeys(("stop", "kill"), "enc cancel RUN"),
    **dict.fromkeys(("continue", "restart"), "enc resume latest"),
    **{name: f"enc ckpt {name} …" for name in ("export", "import", "convert", "consolidate", "verify", "inspect")},
    **{name: f"enc ckpt {name} …" for name in ("diff", "prune")},
    **{name: f"enc config {name} …" for name in ("show", "schema", "sites")},
    "merge-weights": "enc ckpt consolidate …", "recipes": "enc config recipes", "list": "enc ls", "log": "enc logs",
    "version": "enc --version", "help": "enc --help", "slurm": "enc render slurm CFG",
}  # fmt: skip
"""Names that people try, of other tools and of our own subcommands, and the command that does it."""
_BELOW = {
    "config": {"list": "enc config recipes", "copy": _COPY, "validate": _CHECK},
    "ckpt": {"list": "enc ckpt ls RUN", "merge": "enc ckpt consolidate …"},
}  # what the same name means in a group below

_ORDER = (
    "launch", "resume", "status", "logs", "ls", "cancel", "preprocess", "store", "config", "plan", "doctor", "render",
    "report", "eval", "fill-mask", "encode", "ckpt", "bench",
)  # fmt: skip


class HintedGroup(TyperGroup):
    """A group that names the command which somebody probably meant."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the commands in the order in which a run meets them."""
        names = super().list_commands(ctx)
        return sorted(names, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find a command as Typer does; a name that is none but is known elsewhere is answered by the right one."""
        name = args[0]
        meant = {**MEANT, **_BELOW.get(self.name or "", {})}.get(name)
        if meant and self.get_command(ctx, name) is None:
            typer.echo(f"enc: There is no command `{ctx.command_path} {name}`. Did you mean `{meant}`?", err=True)
            raise typer.Exit(2)
        return super().resolve_command(ctx, args)


class KeyedCommand(TyperCommand):
    """A command after whose own words keys of the config can follow, which the shell completes."""

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        offered = [SimpleNamespace(value=key, type="plain", help=None) for key in complete.keys(incomplete)]
        return [*super().shell_complete(ctx, incomplete), *offered]


_SAME_OPTION = {"nproc-per-node": "nproc", "gpus-per-node": "nproc"}


def one_name(option: str) -> str:
    """Return the name under which help lists an option that has several: they would not fit 80 columns."""
    return _SAME_OPTION.get(option, option)
