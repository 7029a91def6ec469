"""Writing and reading the tensors of a checkpoint; the folder's rules are in `enc.encoder.checkpoint`."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from enc.encoder.checkpoint import (
    checkpoints_dir,
    free_bytes_missing,
    read_trainer_state,
    remove_leftovers,
    write_manifest,
)
from enc.encoder.engine.interface import Engine, NamedState
from enc.encoder.errors import EncError, RunError
from enc.encoder.files import fsync_directory
from enc.encoder.ranks import Ranks


def save(
    run_dir: Path,
    step: int,
    engine: Engine,
    trainer_state: dict[str, Any],
    attachments: list[Path],
    ranks: Ranks,
    keep_free_gb: float = 0.0,
) -> Path:
    """Write the checkpoint of `step` and return its folder; collective.

    `attachments` are files and folders that are copied in (config, tokenizer). Raises RunError, with nothing left
    behind, when the disk is too small or a write fails.
    """
    final = checkpoints_dir(run_dir) / str(step)
    temporary = final.with_name(f".{step}.tmp")
    state = engine.state()
    try:
        _on_main(ranks, lambda: _prepare(run_dir, temporary, _num_bytes(state), keep_free_gb))
        _write_moments(temporary / "state", state.moments, ranks)
        _on_main(ranks, lambda: _write_rest(temporary, state, trainer_state, attachments))
        _on_main(ranks, lambda: _commit(temporary, final, step))
    except BaseException:
        if ranks.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def load(folder: Path, engine: Engine, ranks: Ranks) -> dict[str, Any]:
    """Load weights and moments of a checkpoint into an engine and return its trainer state; collective."""
    trainer_state = read_trainer_state(folder)
    template = engine.state()
    weights = read_weights(folder)
    _check_names(folder, weights, template.weights)
    moments = {name: torch.empty_like(value) for name, value in template.moments.items()}
    with _quiet():
        reader = HuggingFaceStorageReader(str(folder / "state"))
        dcp.load(moments, storage_reader=reader, no_dist=ranks.world_size == 1)
    engine.load(NamedState(weights, moments, trainer_state["optimizer_steps"]))
    return trainer_state


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return the fp32 weights of a checkpoint by parameter name."""
    return load_file(folder / "model.safetensors")


def _check_names(folder: Path, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    shapes = [
        f"{name} {tuple(found[name].shape)} (the model has {tuple(wanted[name].shape)})"
        for name in sorted(found.keys() & wanted.keys())
        if found[name].shape != wanted[name].shape
    ]
    parts = [("missing", missing), ("unknown", extra), ("of another shape", shapes)]
    if any(names for _, names in parts):
        listed = "; ".join(f"{what}: {', '.join(names[:5])}" for what, names in parts if names)
        raise RunError(f"The weights of {folder} do not fit the model of this config. Tensors {listed}.")


def _on_main(ranks: Ranks, action: Any) -> None:
    """Run an action on rank 0; all ranks go on together or fail together."""
    error: Exception | None = None
    if ranks.is_main:
        try:
            action()
        except EncError as problem:
            error = problem
        except (OSError, SafetensorError, shutil.Error) as problem:
            error = _write_error(problem)
    ranks.agree(error)


def _write_error(error: BaseException) -> RunError:
    return RunError(
        f"The checkpoint could not be written and was removed again: {error}. Earlier checkpoints are intact. "
        "Make room or mend the folder, then `enc resume latest`."
    )


def _num_bytes(state: NamedState) -> int:
    return sum(t.numel() * t.element_size() for t in [*state.weights.values(), *state.moments.values()])


def _prepare(run_dir: Path, temporary: Path, needed: int, keep_free_gb: float) -> None:
    checkpoints_dir(run_dir).mkdir(parents=True, exist_ok=True)
    remove_leftovers(run_dir)
    missing = free_bytes_missing(run_dir, needed, keep_free_gb * 1e9)
    if missing:
        raise RunError(
            f"The disk of {run_dir} is too full for a checkpoint of {needed / 1e6:.1f} MB: {missing / 1e6:.1f} MB are "
            "missing. Nothing was written. Free some space or lower trainer.save_total_limit, then `enc resume latest`."
        )
    temporary.mkdir()


def _write_moments(folder: Path, moments: dict[str, Tensor], ranks: Ranks) -> None:
    error: Exception | None = None
    try:
        with _quiet():
            writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
            dcp.save(dict(moments), storage_writer=writer, no_dist=ranks.world_size == 1)
    except (CheckpointException, OSError) as problem:  # CheckpointException is a BaseException
        error = _write_error(_first_cause(problem))
    ranks.agree(error)


def _first_cause(error: BaseException) -> BaseException:
    """Return the first rank's own error from what DCP raises."""
    return (
        next((cause for cause, _ in error.failures.values()), error)
        if isinstance(error, CheckpointException)
        else error
    )


def _write_rest(folder: Path, state: NamedState, trainer_state: dict[str, Any], attachments: list[Path]) -> None:
    weights = {name: tensor.float().cpu().contiguous() for name, tensor in state.weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps({**trainer_state, "optimizer_steps": state.optimizer_steps}, indent=1)
    (folder / "trainer_state.json").write_text(text + "\n")
    for path in attachments:
        copy = shutil.copytree if path.is_dir() else shutil.copyfile
        copy(path, folder / path.name)


def _commit(temporary: Path, final: Path, step: int) -> None:
    write_manifest(temporary, step)
    replaced = final.with_name(f".{step}.deleted")
    if final.exists():
        final.rename(replaced)
    temporary.rename(final)
    fsync_directory(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _quiet() -> warnings.catch_warnings:
    """Silence DCP's notice that it runs in a single process."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)
