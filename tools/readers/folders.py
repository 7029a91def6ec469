"""Our checkpoints, Hugging Face and Accelerate folders, and single files of weights."""

import math
from pathlib import Path
from typing import Any

import yaml

from enc.encoder.errors import DamagedError, UsageError
from enc.tools.readers import annotated
from enc.tools.readers.names import split_names
from enc.tools.readers.safetensors_file import indexed_files, read_shards
from enc.tools.readers.source import Source, Stored, damaged, merged, numbers_in, read_json
from enc.tools.readers.torch_file import load_pickle, load_trusted, load_values, optimizer_moments, state_dict_tensors

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
MOMENTS_FILE = "optimizer.safetensors"  # of `enc ckpt convert --to safetensors`
_OPTIMIZER_FILES = ("optimizer.bin", "optimizer.pt")
_STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model_states", "model", "module")


def is_ours(path: Path) -> bool:
    """Tell whether a folder is a checkpoint of a run of enc, whole or damaged."""
    marks = ("manifest.json", "trainer_state.json", "model.safetensors", "state")
    found = {name for name in marks if (path / name).exists()}
    return {"trainer_state.json", "state"} <= found or ("manifest.json" in found and len(found) > 1)


def read_ours(path: Path) -> Source:
    """Read a checkpoint of a run."""
    weights_file = path / "model.safetensors"
    if not weights_file.is_file():
        raise DamagedError(f"{path} is incomplete: model.safetensors is missing. Choose another checkpoint.")
    moment_files = sorted((path / "state").glob("*.safetensors"))
    weights, moments = read_shards([weights_file]), read_shards(moment_files)
    state = path / "trainer_state.json"
    counters = _own_counters(state) if state.is_file() else {}
    return Source(path, "enc", weights, moments, counters, _yaml(path), (weights_file, *moment_files))


def _own_counters(file: Path) -> dict[str, Any]:
    numbers = numbers_in(file, {name: name for name in ("step", "tokens", "optimizer_steps", "world_size")})
    if "step" not in numbers:
        raise damaged(file, "it has no step")
    return {**read_json(file), **numbers}


def read_file(path: Path, trust: bool = False) -> Source:
    """Read one file of weights: a state dict, or a dictionary with one under `state_dict`, `model` or the like.

    With `trust` a pickle may ask for more than tensors and plain values.
    """
    if path.suffix == ".safetensors":
        weights, moments, _ = split_names({(name,): tensor for name, tensor in read_shards([path]).items()})
        return Source(path, "safetensors file", weights, moments, files=(path,))
    if path.suffix in TORCH_SUFFIXES:
        load = load_trusted if trust else load_pickle
        found = load(path)
        if annotated.is_annotated(found):
            return annotated.read(path, found, load)
        weights = _state_dict(path, found)
        if not weights:
            raise UsageError(f"{path} holds no weights. Name the file or folder with the model's state dict.")
        return Source(path, "torch file", weights, files=(path,))
    raise UsageError(
        f"{path} is not a file of weights: read are .safetensors and {', '.join(TORCH_SUFFIXES)}. Name such a file, or "
        "a checkpoint folder."
    )


def _state_dict(path: Path, found: Any) -> dict[str, Stored]:
    if not isinstance(found, dict):
        raise damaged(path, "it holds no dictionary of tensors")
    inner = [found[key] for key in _STATE_DICT_KEYS if isinstance(found.get(key), dict)]
    return state_dict_tensors(path, inner[0] if inner else found)


def read_folder(path: Path) -> Source | None:
    """Read a folder of Hugging Face or Accelerate, or of safetensors files alone; None when it holds none of these."""
    files = _weight_files(path)
    if not files:
        return None
    moments: dict[str, Stored] = {}
    if files[0].suffix == ".safetensors":
        weights, moments, _ = split_names({(name,): tensor for name, tensor in read_shards(files).items()})
    else:
        weights = merged(*(_state_dict(file, load_pickle(file)) for file in files))
    counters = _counters(path)
    name = "Hugging Face" if (path / "config.json").is_file() else "safetensors files"
    if (path / MOMENTS_FILE).is_file():
        moments, files = read_shards([path / MOMENTS_FILE]), [*files, path / MOMENTS_FILE]
    for file in (path / name for name in _OPTIMIZER_FILES):
        if file.is_file():
            numbered, counters["optimizer_steps"] = optimizer_moments(file, load_pickle(file))
            moments, files = {**moments, **numbered}, [*files, file]
            name = "Accelerate" if file.name == "optimizer.bin" else "Hugging Face Trainer"
    return Source(path, name, weights, moments, counters, _yaml(path) or _json_config(path), tuple(files))


def _weight_files(path: Path) -> list[Path]:
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if (path / f"{stem}.index.json").is_file():
            return indexed_files(path / f"{stem}.index.json")
        if (path / stem).is_file():
            return [path / stem]
    return sorted(p for p in path.glob("*.safetensors") if p.name != MOMENTS_FILE)


def _counters(path: Path) -> dict[str, Any]:
    """Return what a folder says of its steps: HF Trainer in JSON, NeoBERT in a file of torch.save."""
    if (path / "trainer_state.json").is_file():
        keep = {"global_step": "step", "step": "step", "epoch": "epoch", "optimizer_steps": "optimizer_steps"}
        return dict(numbers_in(path / "trainer_state.json", keep))
    custom = path / "custom_checkpoint_0.pkl"
    if not custom.is_file():
        return {}
    found = load_values(custom)
    if not isinstance(found, dict):
        return {}
    numbers = {name: value for name, value in found.items() if isinstance(value, int | float) and math.isfinite(value)}
    return {str(name).removeprefix("train/").replace("steps", "step"): value for name, value in numbers.items()}


def _yaml(path: Path) -> dict[str, Any] | None:
    file = path / "config.yaml"
    if not file.is_file():
        return None
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise damaged(file, f"it is not YAML ({error})") from None
    return found if isinstance(found, dict) else None


def _json_config(path: Path) -> dict[str, Any] | None:
    file = path / "config.json"
    found = read_json(file) if file.is_file() else None
    return found if isinstance(found, dict) else None
