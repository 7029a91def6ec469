"""The Python API: what the commands do, as functions. `import enc` gives the same names.

    import enc

    config = enc.load_config("smoke", {"trainer.output_dir": "runs/mine"})
    started = enc.launch(config)
    model = enc.load_model(started.run_dir)
    vectors = enc.encode(model, ["a text", "another one"])  # (2, E) fp32

What goes wrong raises `UsageError` (something is to be changed: exit code 2 of a command) or `RunError` (exit code 3),
with the paragraph that the command prints. Functions that say things take `say`, by default to stderr.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from enc.encoder.errors import RunError, UsageError
from enc.encoder.printable import Say

if TYPE_CHECKING:
    import numpy as np

    from enc.encoder.config.load import Loaded
    from enc.encoder.config.schema import RunConfig
    from enc.encoder.data.store import TokenStore
    from enc.tools.trained import Trained

__all__ = [
    "RunError",
    "Started",
    "UsageError",
    "encode",
    "find_checkpoint",
    "launch",
    "load_config",
    "load_model",
    "open_store",
    "preprocess",
]


class Started(NamedTuple):
    """A run that was launched: queued as a job of a scheduler, or ended here."""

    run_dir: Path
    job: str | None
    """Its job; None for a run on this machine, which has ended."""
    exit_code: int
    """0, or that of `enc launch` for a run that ended early: 2, 3, or 75 when it was stopped with its state saved."""


def to_stderr(text: str) -> None:
    """Print a line for people."""
    print(text, file=sys.stderr)


def load_config(name: str | Path, overrides: Mapping[str, Any] | None = None, say: Say = to_stderr) -> "RunConfig":
    """Return the complete config of a YAML file or a recipe, with `overrides` by dotted key; say its notes.

    Raises UsageError with every problem at once.
    """
    from enc.encoder.config.load import load_config

    return with_notes(load_config(str(name), dict(overrides or {})), say)


def with_notes(loaded: "Loaded", say: Say) -> "RunConfig":
    """Say what the user should be told about a config, and return it."""
    for warning in loaded.warnings:
        say(f"Note: {warning}")
    return loaded.config


def preprocess(config: "RunConfig", say: Say = to_stderr) -> Path:
    """Make the token store of a config, or go on with one that was interrupted; return its folder.

    One that is there already is checked. Raises UsageError when it is another one, or the text cannot be read.
    """
    from enc.encoder.data.sources.find import store_path
    from enc.launcher.planning.token_store import make_store

    make_store(config, say)
    return store_path(config.dataset)


def launch(config: "RunConfig", allow_change: bool = False, say: Say = to_stderr) -> Started:
    """Launch or resume the run of a config: wait for its end on this machine, or queue it where the config says so.

    Raises UsageError when something is wrong before it starts, and nothing is left.
    """
    from enc.launcher.backends.launch import launch
    from enc.launcher.backends.registry import choose_backend, current_job
    from enc.launcher.machine.facts import look
    from enc.launcher.planning.plan import run_folder

    facts = look(current_job(os.environ))
    config, backend = choose_backend(config)
    launched = launch(config, backend, facts, allow_change, say)
    return Started(run_folder(config, facts), launched.job, launched.exit_code)


def open_store(path: str | Path) -> "TokenStore":
    """Open a token store: its splits, documents as arrays of token ids, and its tokenizer. Raises UsageError."""
    from enc.encoder.data.store import TokenStore

    return TokenStore.open(Path(path))


def find_checkpoint(name: str | Path, say: Say = to_stderr) -> Path:
    """Return the checkpoint meant by a checkpoint folder, a run folder (its latest complete one) or `<run>/best`.

    Damaged ones that are passed over are named. Raises UsageError when there is none.
    """
    from enc.encoder.checkpoints.folder import checkpoints_dir, find_checkpoint, split_name
    from enc.launcher.planning.resume import passed_over_text

    path = Path(name)
    if path.is_file():
        raise UsageError(f"{path} is a file, not a checkpoint folder of enc. `enc ckpt import` makes one of weights.")
    in_run = (path, "latest") if checkpoints_dir(path).is_dir() else split_name(path)
    if in_run is None:
        return find_checkpoint(path, str(path.absolute()))[0]
    found, passed_over = find_checkpoint(*in_run)
    for status in passed_over:
        say(passed_over_text(status))
    return found


def load_model(checkpoint: str | Path, say: Say = to_stderr) -> "Trained":
    """Load what was trained: `.model` (a torch module), `.tokenizer` and `.config`, ready to read text.

    `checkpoint` is what `find_checkpoint` takes. Raises UsageError when there is none.
    """
    folder = find_checkpoint(checkpoint, say)
    from enc.tools.trained import Trained  # brings torch along

    return Trained.load(folder)


def encode(model: "Trained", texts: list[str]) -> "np.ndarray":
    """Return the mean hidden state of each text, (number of texts, hidden size) fp32; long ones to their end."""
    from enc.tools.encode import encode

    return encode(model, texts)
