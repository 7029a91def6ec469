"""Writing and reading the tensors of a checkpoint; the folder's rules are in `enc.encoder.checkpoints.folder`.

A save holds training up only while the state is copied to CPU memory, each tensor to one rank. Files are written on a
thread of each rank, which has a process group of its own to agree with the other ranks' threads:

    main thread   gather ──────▶ (trains on) ──────────────────────────────▶ finished? / wait
    writer        prepare folder ▶ own file, checksummed on the way ▶ all agree ▶ rank 0: manifest, rename, prune
"""

import shutil
import threading
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from enc.encoder.checkpoints.folder import (
    checkpoints_dir,
    free_bytes_missing,
    prune,
    read_trainer_state,
    remove_leftovers,
    write_manifest,
)
from enc.encoder.checkpoints.tensor_file import TensorSpec, file_order, write_tensors
from enc.encoder.engine.interface import Engine
from enc.encoder.errors import EncError, RunError
from enc.encoder.files import fsync_directory, write_json
from enc.encoder.optim.state_spec import num_bytes
from enc.encoder.ranks import Ranks

WEIGHTS = "model.safetensors"
_DRAIN_S = 600.0


@dataclass(frozen=True)
class Saved:
    """A checkpoint that has been written."""

    step: int
    folder: Path
    stall_s: float  # training stood still
    seconds: float  # from the start of the save until the folder had its name
    deleted: list[Path]  # older checkpoints that were pruned


class Saver:
    """Saves the state of a run, one checkpoint at a time."""

    def __init__(
        self, run_dir: Path, ranks: Ranks, attachments: list[Path], keep: int | None, keep_free_gb: float = 0.0
    ) -> None:
        """Save below `run_dir`; collective.

        Args:
            attachments: Files and folders that each checkpoint gets a copy of (config, tokenizer).
            keep: Checkpoints that stay when a new one is finished (0 or None: all).
            keep_free_gb: GB that must stay free on the disk.
        """
        self.run_dir, self.ranks, self.attachments = run_dir, ranks.separate(), attachments
        self.keep, self.keep_free_gb = keep, keep_free_gb
        self.thread: threading.Thread | None = None
        self.saved: Saved | None = None
        self.error: Exception | None = None

    def save(self, step: int, engine: Engine, trainer_state: dict[str, Any]) -> None:
        """Copy the state and start to write it. Collective.

        The save before must have been taken note of (`wait`).
        """
        began = time.perf_counter()
        assert self.thread is None
        owners = _owners(engine.shapes, engine.state_shapes, self.ranks.world_size)
        kept = engine.gather(lambda name: owners[name] == self.ranks.rank)
        trainer_state = {**trainer_state, "optimizer_steps": engine.optimizer_steps}
        stall = time.perf_counter() - began
        places = self._places(kept, engine.shapes.keys())
        needed = num_bytes(engine.state_shapes)
        self.thread = threading.Thread(
            target=self._write, args=(step, places, needed, trainer_state, began, stall), daemon=True
        )
        self.thread.start()

    @property
    def finished(self) -> bool:
        """Whether a save has ended on this rank, well or not, that `wait` has not reported yet."""
        return self.thread is not None and not self.thread.is_alive()

    @property
    def failed(self) -> bool:
        return self.finished and self.error is not None

    def wait(self) -> Saved | None:
        """Wait for the save that is under way and return what it wrote; None when there is none.

        Raises RunError, on every rank, when it could not be written; nothing is left behind then.
        """
        if self.thread is None:
            return None
        self.thread.join()
        self.thread = None
        if self.error is not None:
            raise self.error
        return self.saved

    def drain(self) -> None:
        """Give a save that is under way time to end, whatever becomes of the run."""
        if self.thread is not None:
            self.thread.join(_DRAIN_S)

    # --- on the writer's thread --------------------------------------------------------------------------------------

    def _write(
        self, step: int, places: dict[str, dict[str, Tensor]], needed: int, trainer_state: dict[str, Any],
        began: float, stall: float,
    ) -> None:  # fmt: skip
        final = checkpoints_dir(self.run_dir) / str(step)
        temporary = final.with_name(f".{step}.tmp")
        deleted: list[Path] = []
        try:
            self._on_main(lambda: _prepare(self.run_dir, temporary, needed, self.keep_free_gb))
            checksums = self._write_tensors(temporary, places)
            self._on_main(lambda: _write_rest(temporary, trainer_state, self.attachments))
            self._on_main(lambda: _commit(temporary, final, step, checksums))
            self._on_main(lambda: deleted.extend(_prune(self.run_dir, self.keep)))
            self.saved = Saved(step, final, stall, time.perf_counter() - began, deleted)
        except Exception as error:
            self.error = error
            if self.ranks.is_main:
                shutil.rmtree(temporary, ignore_errors=True)

    def _places(self, kept: dict[str, Tensor], weights: Collection[str]) -> dict[str, dict[str, Tensor]]:
        """Return what this rank writes into which file."""
        optimizer_file = f"state/moments-{self.ranks.rank:05d}-of-{self.ranks.world_size:05d}.safetensors"
        return {
            WEIGHTS: {name: tensor for name, tensor in kept.items() if name in weights},
            optimizer_file: {name: tensor for name, tensor in kept.items() if name not in weights},
        }

    def _write_tensors(self, temporary: Path, places: dict[str, dict[str, Tensor]]) -> dict[str, str]:
        """Write this rank's files and return the checksums of all ranks' files."""
        checksums: dict[str, str] = {}
        error: Exception | None = None
        try:
            for file_name, tensors in places.items():
                if tensors:
                    specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
                    ordered = (tensors[name] for name in file_order(specs))
                    checksums[file_name] = write_tensors(temporary / file_name, specs, ordered)
        except Exception as problem:
            error = _write_error(problem)
        self.ranks.agree(error)
        return {name: value for part in self.ranks.gather(checksums) for name, value in part.items()}

    def _on_main(self, action: Callable[[], None]) -> None:
        """Run an action on rank 0; all ranks go on together or fail together."""
        error: Exception | None = None
        if self.ranks.is_main:
            try:
                action()
            except Exception as problem:
                error = _write_error(problem)
        self.ranks.agree(error)


def _owners(weights: dict[str, tuple[int, ...]], state: dict[str, tuple[int, ...]], world_size: int) -> dict[str, int]:
    """Choose the rank that keeps each tensor: weights go to rank 0, all else to the rank with the least so far."""
    owners = dict.fromkeys(weights, 0)
    load = [num_bytes(weights)] + [0] * (world_size - 1)
    for name, shape in state.items():
        if name not in weights:
            owners[name] = load.index(min(load))
            load[owners[name]] += num_bytes({name: shape})
    return owners


def _write_error(error: Exception) -> Exception:
    """Explain what the disk or the system said; other errors stay as they are."""
    if isinstance(error, EncError) or not isinstance(error, OSError):
        return error
    return RunError(
        f"The checkpoint could not be written and was removed again: {error}. Earlier checkpoints are intact. "
        "Make room or mend the folder, then `enc resume latest`."
    )


def _prepare(run_dir: Path, temporary: Path, needed: int, keep_free_gb: float) -> None:
    checkpoints_dir(run_dir).mkdir(parents=True, exist_ok=True)
    remove_leftovers(run_dir)
    missing = free_bytes_missing(run_dir, needed, keep_free_gb * 1e9)
    if missing:
        raise RunError(
            f"The disk of {run_dir} is too full for a checkpoint of {needed / 1e6:.1f} MB: {missing / 1e6:.1f} MB are "
            "missing. Nothing was written. Free some space or lower trainer.save_total_limit, then `enc resume latest`."
        )
    (temporary / "state").mkdir(parents=True)


def _prune(run_dir: Path, keep: int | None) -> list[Path]:
    try:
        return prune(run_dir, keep)
    except OSError as error:
        raise RunError(
            f"Older checkpoints of {run_dir} could not be deleted: {error}. The new one is saved. "
            "Mend the folder, then `enc resume latest`."
        ) from None


def _write_rest(folder: Path, trainer_state: dict[str, Any], attachments: list[Path]) -> None:
    write_json(folder / "trainer_state.json", trainer_state)
    for path in attachments:
        copy = shutil.copytree if path.is_dir() else shutil.copyfile
        copy(path, folder / path.name)


def _commit(temporary: Path, final: Path, step: int, checksums: dict[str, str]) -> None:
    write_manifest(temporary, step, checksums)
    replaced = final.with_name(f".{step}.replaced")
    if final.exists():
        final.rename(replaced)
    temporary.rename(final)
    fsync_directory(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


# --- reading ---------------------------------------------------------------------------------------------------------


def load(folder: Path, engine: Engine) -> dict[str, Any]:
    """Load the whole state of a checkpoint into an engine and return its trainer state; collective.

    Raises RunError, that names the tensors, when they are not those of the engine's model and optimizer.
    """
    trainer_state = read_trainer_state(folder)
    with ExitStack() as stack:
        weights = _opened(stack, [folder / WEIGHTS])
        kept = _opened(stack, sorted((folder / "state").glob("*.safetensors")))
        _refuse_misfits(f"The weights of {folder} do not fit the model of this config", weights, engine.shapes)
        wanted = {name: shape for name, shape in engine.state_shapes.items() if name not in engine.shapes}
        _refuse_misfits(f"The state in {folder} is not what the optimizer of this config keeps", kept, wanted)
        places = weights | kept
        engine.load(lambda name: places[name].get_tensor(name), trainer_state["optimizer_steps"])
    return trainer_state


def _opened(stack: ExitStack, paths: list[Path]) -> dict[str, Any]:
    """Open safetensors files for as long as the stack; return the file of each tensor by its name."""
    files = [stack.enter_context(safe_open(path, framework="pt")) for path in paths]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118 (a safetensors file is no dictionary)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return the fp32 weights of a checkpoint by parameter name."""
    return load_file(folder / WEIGHTS)


def _refuse_misfits(what: str, files: dict[str, Any], wanted: dict[str, tuple[int, ...]]) -> None:
    found = {name: tuple(file.get_slice(name).get_shape()) for name, file in files.items()}
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    shapes = [
        f"{name} {found[name]} (wanted is {wanted[name]})"
        for name in sorted(found.keys() & wanted.keys())
        if found[name] != wanted[name]
    ]
    parts = [("missing", missing), ("unknown", extra), ("of another shape", shapes)]
    if any(names for _, names in parts):
        listed = "; ".join(f"{kind}: {', '.join(names[:5])}" for kind, names in parts if names)
        raise RunError(f"{what}. Tensors {listed}.")
