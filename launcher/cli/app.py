"""The `enc` command. Commands parse, call one function and print; what they need is imported inside them."""

import os
import sys
from typing import Annotated

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
from enc.launcher.cli.options import OVERRIDES

app = typer.Typer(
    name="enc",
    help="Pretrain text encoders, from one laptop CPU to a cluster; exactly resumable.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
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


app.add_typer(cli_run.launch_app, name="launch")
app.command("resume", context_settings=OVERRIDES)(cli_run.resume)
app.command("preprocess", context_settings=OVERRIDES)(cli_run.preprocess)
app.command("plan", context_settings=OVERRIDES)(cli_estimate.estimate)
app.command("doctor", context_settings=OVERRIDES)(cli_doctor.doctor)
app.add_typer(cli_render.render_app, name="render")
app.command("status")(cli_watch.status)
app.command("logs")(cli_watch.logs)
app.command("ls")(cli_watch.list_runs)
app.command("cancel")(cli_watch.cancel)
app.command("report")(cli_run.report)
app.add_typer(cli_run.eval_app, name="eval")
app.command("fill-mask")(cli_use.fill_mask)
app.command("encode")(cli_use.encode)
cli_ckpt.app.command("consolidate")(cli_ckpt_convert.consolidate)
cli_ckpt.app.command("convert")(cli_ckpt_convert.convert)
cli_ckpt.app.command("import", context_settings=OVERRIDES)(cli_ckpt_convert.import_checkpoint)
cli_ckpt.app.command("export")(cli_ckpt_convert.export)
app.add_typer(cli_store.app, name="store")
app.add_typer(cli_ckpt.app, name="ckpt")
app.add_typer(cli_config.app, name="config")
app.add_typer(cli_bench.app, name="bench")


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
