"""The `enc` command. Commands parse, call one function and print; what they need is imported inside them."""

import os
import sys
from typing import Annotated, Any

import typer

from enc import __version__
from enc.encoder.errors import EncError
from enc.encoder.printable import printable
from enc.encoder.text_table import fitted
from enc.launcher.cli import bench as cli_bench
from enc.launcher.cli import ckpt as cli_ckpt
from enc.launcher.cli import ckpt_convert as cli_ckpt_convert
from enc.launcher.cli import config as cli_config
from enc.launcher.cli import doctor as cli_doctor
from enc.launcher.cli import estimate as cli_estimate
from enc.launcher.cli import render as cli_render
from enc.launcher.cli import run as cli_run
from enc.launcher.cli import store as cli_store
from enc.launcher.cli import use as cli_use
from enc.launcher.cli import watch as cli_watch
from enc.launcher.cli.groups import HintedGroup, KeyedCommand, one_name
from enc.launcher.cli.options import OVERRIDES

app = typer.Typer(
    name="enc",
    help="Pretrain text encoders, from one laptop CPU to a cluster; exactly resumable.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    cls=HintedGroup,
    context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": one_name},
    epilog="First steps: `enc launch pretrain quickstart`, or `enc config copy quickstart my.yaml` and your own text.",
)


def _show_version(show: bool) -> None:
    if show:
        typer.echo(f"enc {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if debug:
        os.environ["ENC_DEBUG"] = "1"


_RUN, _PREPARE, _AFTER = "Run", "Prepare", "Afterwards"
_KEYED: dict[str, Any] = {"cls": KeyedCommand, "context_settings": OVERRIDES}
app.add_typer(cli_run.launch_app, name="launch", rich_help_panel=_RUN)
app.command("resume", **_KEYED, rich_help_panel=_RUN, epilog="Example: enc resume latest --run runs/a")(cli_run.resume)
app.command("status", rich_help_panel=_RUN)(cli_watch.status)
app.command("logs", rich_help_panel=_RUN)(cli_watch.logs)
app.command("ls", rich_help_panel=_RUN)(cli_watch.list_runs)
app.command("cancel", rich_help_panel=_RUN)(cli_watch.cancel)
app.command(
    "preprocess", **_KEYED, rich_help_panel=_PREPARE, epilog="Example: enc preprocess quickstart"
)(cli_run.preprocess)  # fmt: skip
app.add_typer(cli_config.app, name="config", rich_help_panel=_PREPARE)
app.add_typer(cli_store.app, name="store", rich_help_panel=_PREPARE)
app.command(
    "plan", **_KEYED, rich_help_panel=_PREPARE,
    epilog="Example: enc plan neobert-250m --nodes 4 --nproc 8 --gpu h100-80gb",
)(cli_estimate.estimate)  # fmt: skip
app.command("doctor", **_KEYED, rich_help_panel=_PREPARE)(cli_doctor.doctor)
app.add_typer(cli_render.render_app, name="render", rich_help_panel=_PREPARE)
app.command("report", rich_help_panel=_AFTER, epilog="Example: enc report runs/a runs/b -o page.html")(cli_run.report)
app.add_typer(cli_run.eval_app, name="eval", rich_help_panel=_AFTER)
app.command("fill-mask", rich_help_panel=_AFTER, epilog='Example: enc fill-mask runs/a "a [MASK] of text"')(
    cli_use.fill_mask
)
app.command("encode", rich_help_panel=_AFTER)(cli_use.encode)
cli_ckpt.app.command("consolidate")(cli_ckpt_convert.consolidate)
cli_ckpt.app.command("convert")(cli_ckpt_convert.convert)
cli_ckpt.app.command("import", context_settings=OVERRIDES)(cli_ckpt_convert.import_checkpoint)
cli_ckpt.app.command("export", epilog="Example: enc ckpt export runs/quickstart")(cli_ckpt_convert.export)
app.add_typer(cli_ckpt.app, name="ckpt", rich_help_panel=_AFTER)
app.add_typer(cli_bench.app, name="bench", rich_help_panel=_AFTER)


def _lines(error: Exception) -> str:
    """Return a message with its line breaks, everything else that does not print escaped."""
    return "\n".join(printable(line) for line in str(error).split("\n"))


def _complain(message: str) -> None:
    """Say what is wrong: one paragraph, in words that are whole, its first one red on a terminal."""
    name, _, rest = fitted(f"enc: {message}", sys.stderr).partition(" ")
    typer.echo(f"{typer.style(name, fg=typer.colors.RED, bold=True)} {rest}", err=True, color=_colour())


def _colour() -> bool | None:
    return False if os.environ.get("NO_COLOR") else None  # None: on a terminal


def main() -> None:
    """Run the command line; an error of the user's is one paragraph on stderr."""
    try:
        app()
    except EncError as error:
        if os.environ.get("ENC_DEBUG"):
            raise
        _complain(_lines(error))
        sys.exit(error.exit_code)
    except PermissionError as error:
        if os.environ.get("ENC_DEBUG"):
            raise
        place = printable(error.filename or "A file")
        _complain(f"{place} may not be read or written by you. Mend its permissions and repeat.")
        sys.exit(3)
    except Exception as error:
        if os.environ.get("ENC_DEBUG"):
            raise
        _complain(f"unexpected {type(error).__name__}: {_lines(error)}. `enc --debug` shows the traceback.")
        sys.exit(3)
