"""What is kept of each launch, and moving an older run aside."""

import json
import platform
import shlex
import socket
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from enc import __version__
from enc.encoder.checkpoints.folder import list_checkpoints
from enc.encoder.engine.settings import DEEPSPEED_FILE, FSDP_FILE
from enc.encoder.errors import UsageError
from enc.encoder.files import replace_atomically
from enc.launcher.run_folder.read import newest_attempt


def refuse_older_run(run_dir: Path) -> None:
    """Raise UsageError when the folder holds checkpoints, so that no older run is overwritten."""
    found = list_checkpoints(run_dir)
    if found:
        raise UsageError(
            f"{run_dir} already holds a run with a checkpoint of step {found[-1].name}. To go on with it: `enc resume "
            f"latest --run {run_dir}`. For a new run choose another trainer.output_dir, or set "
            "trainer.overwrite_output_dir true, which moves the old run aside."
        )


def move_aside(run_dir: Path, say: Callable[[str], None]) -> Path | None:
    """Move an older run's files to `<run_dir>.replaced-<n>` and return that folder; None when there is no such run."""
    if not list_checkpoints(run_dir):
        return None
    number = 1
    while (target := run_dir.with_name(f"{run_dir.name}.replaced-{number}")).exists():
        number += 1
    target.mkdir()
    for path in run_dir.iterdir():
        if path.name != ".lock":
            path.rename(target / path.name)
    say(f"The run that was in {run_dir} is now in {target}.")
    return target


def move_back(target: Path, run_dir: Path, say: Callable[[str], None]) -> None:
    """Undo `move_aside`, for a run that did not come to be."""
    for path in target.iterdir():
        path.rename(run_dir / path.name)
    target.rmdir()
    say(f"The older run is back in {run_dir}.")


def record_launch(
    run_dir: Path, files: dict[str, str], command: list[str], plan: dict[str, Any], job: str | None = None
) -> int:
    """Write the rendered files into the run folder and into a new `launches/<n>/`; return n."""
    attempt = (newest_attempt(run_dir) or 0) + 1
    folder = run_dir / "launches" / str(attempt)
    folder.mkdir(parents=True)
    for name in {DEEPSPEED_FILE, FSDP_FILE} - set(files):  # of an earlier launch with another engine
        (run_dir / name).unlink(missing_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
        replace_atomically(run_dir / name, text)
    record = {
        "attempt": attempt, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "host": socket.gethostname(),
        "command": shlex.join(command), "enc": __version__, "git": git_state(Path.cwd()), "plan": plan,
        "job": job, "python": platform.python_version(), "system": platform.platform(),
    }  # fmt: skip
    (folder / "launch.json").write_text(json.dumps(record, indent=1) + "\n")
    installed = sorted({f"{d.metadata['Name']}=={d.version}" for d in distributions()}, key=str.lower)
    (folder / "environment.txt").write_text("\n".join(installed) + "\n")
    return attempt


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return the commit of the repository that holds `folder` and whether files differ from it; None outside one."""
    try:
        command = ["git", "-C", str(folder), "status", "--porcelain=v2", "--branch"]
        output = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    lines = output.splitlines()
    commit = next((line.split()[2] for line in lines if line.startswith("# branch.oid")), None)
    return {"commit": commit, "changed_files": sum(not line.startswith("#") for line in lines)}


RUN_FILES = ("events.jsonl", "metrics.jsonl", "launches")
