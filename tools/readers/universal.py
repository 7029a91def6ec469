"""DeepSpeed universal folders: `zero/<parameter>/` with `fp32.pt`, `step.pt` and a file for each kind of moment."""

from pathlib import Path

from torch import Tensor

from enc.encoder.optim.state_spec import KINDS
from enc.tools.readers.source import Source, Stored, damaged, is_file_name
from enc.tools.readers.torch_file import load_pickle, number_of, stored


def find_folder(path: Path) -> Path | None:
    """Return the folder above `zero` that a path means: itself, or the one that `latest_universal` names."""
    if (path / "zero").is_dir():
        return path
    latest = path / "latest_universal"
    if not latest.is_file():
        return None
    tag = latest.read_text(encoding="utf-8", errors="replace").strip()
    if not is_file_name(tag) or not (path / tag / "zero").is_dir():
        raise damaged(latest, "it does not name a universal folder beside it")
    return path / tag


def read(folder: Path) -> Source:
    """Read a universal folder. Raises UsageError when a file of it is damaged."""
    weights: dict[str, Stored] = {}
    moments: dict[str, Stored] = {}
    files: list[Path] = []
    step = None
    for parameter in sorted(p for p in (folder / "zero").iterdir() if p.is_dir()):
        for kind in ("fp32", *KINDS):
            file = parameter / f"{kind}.pt"
            if kind != "fp32" and not file.exists():
                continue
            tensor = _tensor(file)
            files.append(file)
            (weights if kind == "fp32" else moments)[_name(kind, parameter.name)] = stored(file, tensor)
        if step is None and (parameter / "step.pt").is_file():
            step = number_of(parameter / "step.pt", load_pickle(parameter / "step.pt"))
    return Source(folder, "DeepSpeed universal", weights, moments, _counters(folder, step), files=tuple(files))


def _name(kind: str, parameter: str) -> str:
    return parameter if kind == "fp32" else f"{kind}.{parameter}"


def _tensor(file: Path) -> Tensor:
    """Return the tensor of one file, which holds it alone or, from stages 1 and 2, as `param` of a dictionary."""
    found = load_pickle(file)
    tensor = found.get("param") if isinstance(found, dict) else found
    if not isinstance(tensor, Tensor):
        raise damaged(file, "it holds no tensor")
    return tensor


def _counters(folder: Path, step: int | None) -> dict[str, int | None]:
    counters = {"optimizer_steps": step}
    for file in sorted(folder.glob("*mp_rank_00_model_states.pt")):
        found = load_pickle(file)
        if isinstance(found, dict) and "global_steps" in found:
            counters["step"] = number_of(file, found["global_steps"])
            break
    return counters
