"""Checkpoints of annotated-mpnet: `checkpoint<step>.pt`, and the optimizer in a file of its own in `optimizer/`."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from enc.encoder.errors import UsageError
from enc.tools.readers.source import Source, damaged
from enc.tools.readers.torch_file import optimizer_moments, state_dict_tensors

FORMAT = "annotated-mpnet"
_COMPILED = "_orig_mod."  # what torch.compile puts before names


def is_annotated(found: Any) -> bool:
    """Tell whether a loaded file is one of annotated-mpnet's checkpoints."""
    return isinstance(found, dict) and {"args", "model_states"} <= found.keys()


def read(path: Path, found: dict[str, Any], load: Callable[[Path], Any]) -> Source:
    """Read a checkpoint and, when it is there, its optimizer's file, which `load` loads.

    A checkpoint without `data_state`, as older versions wrote them, has weights only: the step is not its position in
    a training that could be gone on with, and annotated-mpnet itself starts again at 0 from it.
    """
    args = found["args"]
    args = vars(args) if isinstance(args, Namespace) else args  # in a trusted file
    if not isinstance(args, dict) or not isinstance(found["model_states"], dict):
        raise damaged(path, "its arguments or weights are no dictionary")
    weights = state_dict_tensors(path, found["model_states"])
    weights = {name.removeprefix(_COMPILED): tensor for name, tensor in weights.items()}
    step, optimizer_file = found.get("steps"), _optimizer_file(path)
    if not found.get("data_state") or type(step) is not int or step < 0:
        return Source(path, FORMAT, weights, config=args, files=(path,))
    counters = {"step": step, "samples": found.get("samples_processed")}
    if not optimizer_file.is_file():
        return Source(path, FORMAT, weights, {}, counters, args, (path,))
    state = load(optimizer_file)
    if not isinstance(state, dict) or "optimizer" not in state:
        raise damaged(optimizer_file, "it holds no optimizer")
    if state.get("steps") != step:
        raise UsageError(
            f"{path} is of step {step}, the optimizer in {optimizer_file} of step {state.get('steps')}. Copy the one "
            "that belongs to it, or move the file away to read the weights alone."
        )
    moments, counters["optimizer_steps"] = optimizer_moments(optimizer_file, state["optimizer"])
    return Source(path, FORMAT, weights, moments, counters, args, (path, optimizer_file))


def _optimizer_file(path: Path) -> Path:
    stem = "best" if path.stem == "best_checkpoint" else path.stem
    return path.parent / "optimizer" / f"{stem}_optimizer_state.pt"


def newest(folder: Path) -> Path | None:
    """Return the newest `checkpoint<step>.pt` of a folder, None when there is none."""
    steps = {p.stem.removeprefix("checkpoint"): p for p in folder.glob("checkpoint*.pt")}
    numbered = {int(step): p for step, p in steps.items() if step.isdecimal()}
    return numbered[max(numbered)] if numbered else None
