"""`enc ckpt`, looking at checkpoints: ls, inspect, verify, diff, prune."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from enc.encoder.printable import jsonable, printable
from enc.encoder.progress import shown
from enc.launcher.api import find_checkpoint
from enc.launcher.cli import complete
from enc.launcher.cli.groups import HintedGroup
from enc.launcher.cli.options import checkpoint_argument, say

app = typer.Typer(cls=HintedGroup, help="Look at checkpoints and turn them into other formats.", no_args_is_help=True)

Result = TypeVar("Result")
AnyArgument = Annotated[
    str,
    checkpoint_argument("CKPT", "Checkpoint of any format, RUN (its latest) or RUN/best."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def checkpoint_folder(name: str) -> Path:
    """Return the checkpoint meant by a checkpoint folder, a run folder or <run>/best. Raises UsageError without one."""
    return find_checkpoint(name, say)


def any_checkpoint(name: str, only_complete: bool = True) -> Path:
    """Return the checkpoint, of any format, that a path means; of a run folder the latest one.

    Raises UsageError when ours is damaged, unless `only_complete` is off.
    """
    from enc.encoder.checkpoints.folder import split_name
    from enc.tools.readers.detect import newest_foreign
    from enc.tools.readers.folders import is_ours

    path = Path(name)
    if split_name(path):
        return checkpoint_folder(name)
    if found := newest_foreign(path):
        say(f"Reading {found}, the newest checkpoint of {path}.")
        return found
    ours = path.is_dir() and (is_ours(path) or (path / "checkpoints").is_dir())
    if ours and (only_complete or not is_ours(path)):
        return checkpoint_folder(name)
    return path


@app.command("ls")
def list_all(
    run: Annotated[
        str | None,
        typer.Argument(metavar="RUN", help="Run folder; by default the newest one here.", autocompletion=complete.runs),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the checkpoints of a run: step, state, size, tokens seen."""
    from enc.encoder.checkpoints.folder import list_checkpoints, verify
    from enc.launcher.run_folder.find import find_run

    statuses = verified(list_checkpoints(find_run(run)), verify)
    rows: list[dict[str, Any]] = []
    for status in statuses:
        tokens = _tokens(status.path) if status.state == "complete" else None
        rows.append({"step": status.step, "state": status.state, "bytes": status.num_bytes, "tokens": tokens,
                     "path": str(status.path), "problems": status.problems})  # fmt: skip
    if as_json:
        typer.echo(_json(rows))
        return
    for row in rows:
        seen = "" if row["tokens"] is None else f"{row['tokens']:>14,} tokens"
        typer.echo(f"{row['step']:>8}  {row['state']:<12} {row['bytes'] / 1e6:>9.1f} MB {seen}")
        for problem in row["problems"][:3]:
            typer.echo(f"{'':>10}{printable(problem)}")


def verified(paths: list[Path], verify: Callable[[Path], Result]) -> list[Result]:
    """Verify checkpoints one after another, and show how far that is."""
    results = []
    with shown("Comparing checksums") as show:
        for number, path in enumerate(paths):
            show(number, len(paths))
            results.append(verify(path))
    return results


def _tokens(folder: Path) -> int | None:
    """Return the tokens seen up to a checkpoint; None when it does not say."""
    state = _trainer_state(folder)
    return state["tokens"] if state and isinstance(state.get("tokens"), int) else None


def _trainer_state(folder: Path) -> dict[str, Any] | None:
    from enc.encoder.checkpoints.folder import read_trainer_state

    try:
        found = read_trainer_state(folder)
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _json(found: Any) -> str:
    return json.dumps(jsonable(found), indent=1, allow_nan=False)


@app.command()
def inspect(checkpoint: AnyArgument, as_json: JsonOption = False) -> None:
    """Show a checkpoint's counters, position and tensors: shape, dtype, bytes, norm, non-finite values."""
    from enc.tools.inspect import inspect_checkpoint, inspection_text

    with shown("Reading tensors"):
        found = inspect_checkpoint(any_checkpoint(checkpoint, only_complete=False))
    typer.echo(_json(found) if as_json else inspection_text(found))


@app.command()
def verify(
    checkpoint: Annotated[
        str,
        checkpoint_argument("CKPT", "Checkpoint of any format, or a run folder (all of its)."),
    ],
    as_json: JsonOption = False,
) -> None:
    """Compare every file with its checksum, as far as the format has any; exit code 3 when something is wrong."""
    from enc.encoder.checkpoints import folder as folder
    from enc.encoder.errors import UsageError
    from enc.tools.readers.folders import is_ours

    path = checkpoint_folder(checkpoint) if folder.split_name(Path(checkpoint)) else Path(checkpoint)
    if not path.exists():
        raise UsageError(f"There is no checkpoint {path}.")
    paths = folder.list_checkpoints(path) or [path]
    results = verified(paths, lambda p: (folder.verify(p), []) if p.is_dir() and is_ours(p) else _verified_foreign(p))
    if as_json:
        rows = [{"path": str(s.path), "state": s.state, "problems": s.problems, "checked": c} for s, c in results]
        typer.echo(_json(rows))
    else:
        for status, checked in results:
            typer.echo(f"{printable(status.path)}: {status.state}")
            for line in [*status.problems, *checked]:
                typer.echo(f"  {printable(line)}")
    if any(status.state == "damaged" or (not checked and status.state != "complete") for status, checked in results):
        sys.exit(3)


def _verified_foreign(path: Path) -> Any:
    from enc.tools.verify import verify_foreign

    return verify_foreign(path)


@app.command()
def diff(
    a: Annotated[
        str,
        checkpoint_argument("A", "Checkpoint of any format, RUN (its latest) or RUN/best."),
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="The other one.")],
    as_json: JsonOption = False,
) -> None:
    """Compare the tensors and the configs of two checkpoints; exit code 1 when they differ."""
    from enc.tools.diff import diff_sources, diff_text, is_equal
    from enc.tools.readers.detect import open_source

    first, second = (open_source(any_checkpoint(name, only_complete=False)) for name in (a, b))
    with shown("Comparing tensors"):
        found = diff_sources(first, second)
    typer.echo(_json(found) if as_json else diff_text(found))
    if not is_equal(found):
        sys.exit(1)


@app.command()
def prune(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run folder.", autocompletion=complete.runs)],
    keep: Annotated[int, typer.Option("--keep", metavar="N", min=1, help="Newest complete checkpoints to keep.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be deleted, delete nothing.")] = False,
) -> None:
    """Delete the older checkpoints of a run and print them.

    Damaged ones, the last healthy one and the best one always stay.
    """
    from enc.encoder.checkpoints import folder as folder
    from enc.launcher.backends.registry import find_jobs
    from enc.launcher.run_folder.find import find_run
    from enc.launcher.run_folder.lock import RunLock

    run_dir = find_run(run)
    _refuse_unknown_health(run_dir)
    if dry_run:
        doomed = folder.prunable(run_dir, keep)
    else:
        lock = RunLock(run_dir, find_jobs)
        doomed = folder.prune(run_dir, keep)
        lock.release()
    for path in doomed:
        typer.echo(str(path))
    kept = len(folder.list_checkpoints(run_dir)) - (len(doomed) if dry_run else 0)
    say(f"{'Would delete' if dry_run else 'Deleted'} {len(doomed)} checkpoints of {run_dir}, {kept} stay.")


def _refuse_unknown_health(run_dir: Path) -> None:
    """Raise UsageError when a complete checkpoint does not say whether its loss was finite."""
    from enc.encoder.checkpoints.folder import list_checkpoints, verify
    from enc.encoder.errors import UsageError

    for path in list_checkpoints(run_dir):
        if verify(path, contents=False).state == "complete" and _trainer_state(path) is None:
            raise UsageError(
                f"{path} has no trainer_state.json that can be read, so which checkpoint is the last healthy one is "
                "not known. Nothing was deleted. Remove or restore that folder first."
            )
