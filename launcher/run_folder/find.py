"""Finding run folders."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from enc.encoder.errors import UsageError
from enc.encoder.progress import NOTE_FILE
from enc.launcher.run_folder.read import read_lock, tail
from enc.launcher.run_folder.records import RUN_FILES

_NO_RUNS_BELOW = ("checkpoints", "launches", "logs", "tensorboard", "wandb")


def find_runs(folder: Path, depth: int = 3) -> list[Path]:
    """Return the run folders at or below `folder`, the one with the newest launch or event first.

    Folders that may not be read are passed over.
    """
    return [Path(name) for _, name in sorted(_walk_runs(str(folder), depth), reverse=True)]


def _walk_runs(folder: str, depth: int) -> Iterator[tuple[float, str]]:
    """Yield (time of the newest launch or event, path) of every run; a run has a config and has written something."""
    try:
        entries = {entry.name: entry for entry in os.scandir(folder)}
    except OSError:
        return
    if "config.yaml" in entries and any(name in entries for name in RUN_FILES):
        with contextlib.suppress(OSError):
            times = [entries[name].stat().st_mtime for name in ("config.yaml", "events.jsonl") if name in entries]
            yield max(times), folder
    for name, entry in entries.items():
        if depth > 0 and not name.startswith(".") and name not in _NO_RUNS_BELOW and _is_folder(entry):
            yield from _walk_runs(entry.path, depth - 1)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def being_prepared(run: Path) -> str | None:
    """Return what a launch does before its run has a config, such as to tokenise; None when nobody is at it."""
    if not read_lock(run).held:
        return None
    return tail(run / NOTE_FILE, 2**12).decode(errors="replace").strip() or "Its launch is at work"


def find_run(run: str | None) -> Path:
    """Return the given run folder, or the newest one below the working directory. Raises UsageError without one."""
    if run is not None:
        path = Path(run)
        if not (path / "config.yaml").is_file():
            if doing := being_prepared(path):
                raise UsageError(f"{path} is being prepared and has not begun to train. {doing}.")
            raise UsageError(
                f"{path} is not a run folder: it has no config.yaml. Name the trainer.output_dir of a run."
            )
        return path
    runs = find_runs(Path.cwd())
    if not runs:
        raise UsageError(f"There is no run in {Path.cwd()} or three levels below it. Name its folder.")
    return runs[0]
