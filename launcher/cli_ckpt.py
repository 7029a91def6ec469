"""`enc ckpt`: ls, inspect, verify, export."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from enc.launcher.options import say

app = typer.Typer(help="Look at checkpoints and turn them into models.", no_args_is_help=True)

CheckpointArgument = Annotated[
    str, typer.Argument(metavar="CKPT", help="Checkpoint folder, or a run folder (its latest).")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def checkpoint_folder(name: str) -> Path:
    """Return the checkpoint meant by a checkpoint folder or by a run folder. Raises UsageError when there is none."""
    from enc.encoder.checkpoint import checkpoints_dir, find_checkpoint
    from enc.launcher.launch import passed_over_text

    path = Path(name)
    if checkpoints_dir(path).is_dir():
        found, passed_over = find_checkpoint(path, "latest")
        for status in passed_over:
            say(passed_over_text(status))
        return found
    return find_checkpoint(path, str(path.absolute()))[0]


@app.command("ls")
def list_all(
    run: Annotated[
        str | None, typer.Argument(metavar="RUN", help="Run folder; by default the newest one here.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the checkpoints of a run: step, state, size, tokens seen."""
    from enc.encoder.checkpoint import list_checkpoints, read_trainer_state, verify
    from enc.launcher.run_folder import find_run

    statuses = [verify(path) for path in list_checkpoints(find_run(run))]
    rows: list[dict[str, Any]] = []
    for status in statuses:
        tokens = read_trainer_state(status.path)["tokens"] if status.state == "complete" else None
        rows.append({"step": status.step, "state": status.state, "bytes": status.num_bytes, "tokens": tokens,
                     "path": str(status.path), "problems": status.problems})  # fmt: skip
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    for row in rows:
        seen = "" if row["tokens"] is None else f"{row['tokens']:>14,} tokens"
        typer.echo(f"{row['step']:>8}  {row['state']:<12} {row['bytes'] / 1e6:>9.1f} MB {seen}")
        for problem in row["problems"][:3]:
            typer.echo(f"{'':>10}{problem}")


@app.command()
def inspect(checkpoint: CheckpointArgument, as_json: JsonOption = False) -> None:
    """Show a checkpoint's counters and its tensors: shape, dtype, bytes, norm, non-finite values."""
    from enc.tools.inspect import inspect_checkpoint, inspection_text

    found = inspect_checkpoint(checkpoint_folder(checkpoint))
    typer.echo(json.dumps(found, indent=1) if as_json else inspection_text(found))


@app.command()
def verify(
    checkpoint: Annotated[str, typer.Argument(metavar="CKPT", help="Checkpoint folder, or a run folder (all of its).")],
    as_json: JsonOption = False,
) -> None:
    """Compare every file with its checksum; exit code 3 when something is wrong."""
    from enc.encoder import checkpoint as folder
    from enc.encoder.errors import UsageError

    path = Path(checkpoint)
    paths = folder.list_checkpoints(path) or [path]
    if not path.is_dir():
        raise UsageError(f"There is no checkpoint {path}.")
    for found in paths:
        folder.refuse_other_folder(found)
    statuses = [folder.verify(p) for p in paths]
    if as_json:
        rows = [{"path": str(s.path), "state": s.state, "problems": s.problems} for s in statuses]
        typer.echo(json.dumps(rows, indent=1))
    else:
        for status in statuses:
            typer.echo(f"{status.path}: {status.state}")
            for problem in status.problems:
                typer.echo(f"  {problem}")
    if any(status.state != "complete" for status in statuses):
        sys.exit(3)


@app.command()
def export(
    checkpoint: CheckpointArgument,
    out: Annotated[
        str | None, typer.Option("--out", metavar="DIR", help="New folder; by default <run>/hf/<step>.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="fp32 or bf16.")] = "fp32",
) -> None:
    """Write a folder that transformers loads, after comparing its logits with the training model's; print its path."""
    from enc.tools.export import export_checkpoint

    result = export_checkpoint(checkpoint_folder(checkpoint), Path(out) if out else None, dtype)
    say(
        f"Exported {result.num_parameters / 1e6:.1f} M parameters, {result.num_bytes / 1e6:.1f} MB; its logits differ "
        f"from the training model's by at most {result.max_difference:.1e} of the largest logit."
    )
    typer.echo(str(result.folder))
