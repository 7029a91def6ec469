"""Native DeepSpeed folders, ZeRO stages 0 to 3.

A rank's file of optimizer states holds flat fp32 vectors, one a group of parameters, and moments of the same shape.

    stages 1, 2   The vectors of all ranks, one after the other, are the group's parameters one after the other,
                  sometimes with padding behind each (`param_alignment_paddings`), and padding at the end, which the
                  last ranks leave out.
    stage 3       Each rank has its share of every parameter: ceil(n / ranks) of its n elements, padded on the last
                  ranks. The shares of all parameters lie one after the other in the rank's vectors, and one share may
                  begin in one vector and end in the next.

Shapes are in the files of model states. deepspeed/utils/zero_to_fp32.py of DeepSpeed 0.19 is the reference.
"""

import math
import re
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from enc.encoder.checkpoints.tensor_file import TensorSpec
from enc.encoder.errors import DamagedError, UsageError
from enc.encoder.optim.state_spec import KINDS
from enc.encoder.printable import shown
from enc.tools.readers.source import Extent, Source, Stored, StoredTensor, damaged, is_file_name
from enc.tools.readers.torch_file import (
    flat_part,
    load_pickle,
    number_of,
    optimizer_moments,
    state_dict_tensors,
    stored,
)

_OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_COUNTERS = {"global_steps": "step", "global_samples": "samples", "skipped_steps": "skipped_steps",
             "dp_world_size": "world_size", "ds_version": "deepspeed"}  # fmt: skip

RankTensors = list[tuple[Path, list[Tensor]]]  # of each rank: its file and its flat vectors


def find_folder(path: Path) -> Path | None:
    """Return the folder with the states that a path means: itself, or the one that its file `latest` names."""
    if any(_MODEL_FILE.fullmatch(p.name) or _OPTIMIZER_FILE.fullmatch(p.name) for p in path.glob("*_states.pt")):
        return path
    latest = path / "latest"
    if not latest.is_file():
        return None
    tag = latest.read_text(encoding="utf-8", errors="replace").strip()
    if not is_file_name(tag):
        raise damaged(latest, "it does not name a folder beside it")
    if not (path / tag).is_dir():
        raise DamagedError(f"{latest} names {tag}, which is not there. Name one of the folders of {path} instead.")
    return path / tag


def read(folder: Path) -> Source:
    """Read a folder of DeepSpeed states. Raises UsageError when files are missing, or for what is not supported."""
    model_file = _model_file(folder)
    model = load_pickle(model_file)
    if not isinstance(model, dict) or "module" not in model:
        raise damaged(model_file, "it is not a file of DeepSpeed's model states")
    if model.get("frozen_param_shapes"):
        raise UsageError(f"{folder} has frozen parameters, which are not read. Use DeepSpeed's own zero_to_fp32.py.")
    counters = {ours: model[theirs] for theirs, ours in _COUNTERS.items() if theirs in model}
    files = _optimizer_files(folder, model.get("dp_world_size"))
    if not files:
        weights = state_dict_tensors(model_file, model["module"])
        moments, step = optimizer_moments(model_file, model.get("optimizer"))
        counters.update({"zero_stage": 0, "optimizer_steps": step})
        return Source(folder, "DeepSpeed", weights, moments, counters, files=(model_file,))
    return _read_partitioned(folder, model_file, model, files, counters)


def _read_partitioned(
    folder: Path, model_file: Path, model: dict[str, Any], files: list[Path], counters: dict[str, Any]
) -> Source:
    states = [_optimizer_state(file) for file in files]
    _check_world_size(folder, states)
    partitioned_weights = "fp32_flat_groups" in states[0]
    place = _stage_3 if partitioned_weights else _stages_1_and_2
    try:
        shapes = [{name: tuple(shape) for name, shape in group.items()} for group in model["param_shapes"]]
        weights = place(folder, shapes, _weight_vectors(files, states), states)
        moments: dict[str, Stored] = {}
        for kind in KINDS:
            vectors = _moment_vectors(files, states, kind)
            if vectors is not None:
                found = place(folder, shapes, vectors, states)
                moments.update({f"{kind}.{name}": tensor for name, tensor in found.items()})
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise damaged(folder, f"its files lack {error}") from None
    buffers = model.get("buffer_names") or []
    weights.update({name: stored(model_file, model["module"][name]) for name in buffers if name in model["module"]})
    shared = dict(model.get("shared_params") or {})
    weights.update({alias: weights[name] for alias, name in shared.items() if name in weights})
    counters["zero_stage"] = int(states[0].get("zero_stage", 3 if partitioned_weights else 1))
    counters["optimizer_steps"] = _optimizer_steps(files[0], states[0])
    paths = (model_file, *files)
    return Source(folder, "DeepSpeed", weights, moments, counters, files=paths, buffers=frozenset(buffers))


# --- files -----------------------------------------------------------------------------------------------------------


def _model_file(folder: Path) -> Path:
    names = {p.name: match for p in folder.iterdir() if (match := _MODEL_FILE.fullmatch(p.name))}
    if any(int(match[2]) for match in names.values()):
        raise UsageError(f"{folder} was written with tensor parallelism, which is not read. Merge its ranks first.")
    if any("expert" in p.name for p in folder.glob("*_model_states.pt")):
        raise UsageError(f"{folder} holds a mixture of experts, which is not read. Use DeepSpeed's ds_to_universal.py.")
    first = [name for name, match in names.items() if match[1] is None or int(match[1]) == 0]
    if not first:
        raise DamagedError(f"{folder} is incomplete: the model states of rank 0 are missing. Copy the folder again.")
    return folder / min(first)


def _optimizer_files(folder: Path, world_size: object) -> list[Path]:
    ranks = {int(match[1]): p for p in folder.iterdir() if (match := _OPTIMIZER_FILE.fullmatch(p.name))}
    sharded = any(p.name.startswith("zero_pp_rank_") for p in folder.glob("*_model_states.pt"))
    if not ranks and not sharded:
        return []
    number = world_size if isinstance(world_size, int) else max(ranks, default=0) + 1
    missing = [str(rank) for rank in range(number) if rank not in ranks]
    if missing:
        raise DamagedError(
            f"{folder} is incomplete: the optimizer states of rank {', '.join(missing[:8])} of {number} are missing. "
            "Copy the folder again, from all nodes."
        )
    return [ranks[rank] for rank in sorted(ranks)]


def _optimizer_state(file: Path) -> dict[str, Any]:
    found = load_pickle(file)
    state = found.get("optimizer_state_dict") if isinstance(found, dict) else None
    if not isinstance(state, dict) or not state.keys() & {"fp32_flat_groups", "single_partition_of_fp32_groups"}:
        raise damaged(file, "it is not a file of ZeRO optimizer states")
    return state


def _check_world_size(folder: Path, states: list[dict[str, Any]]) -> None:
    count = states[0].get("partition_count", len(states))
    number = max(count) if isinstance(count, list) else count
    if number != len(states):
        raise DamagedError(
            f"{folder} has the optimizer states of {len(states)} ranks, but was cut for {number}. Files of two "
            "checkpoints may be mixed, or some are missing: copy the folder again."
        )


def _weight_vectors(files: list[Path], states: list[dict[str, Any]]) -> RankTensors:
    key = "fp32_flat_groups" if "fp32_flat_groups" in states[0] else "single_partition_of_fp32_groups"
    return [(file, list(state[key])) for file, state in zip(files, states, strict=True)]


def _entries(state: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what the wrapped optimizer keeps of each flat vector."""
    inner = state.get("base_optimizer_state", state.get("optimizer_state_dict"))
    if isinstance(inner, dict):
        inner = inner.get("state") or {}
        return [inner[number] for number in sorted(inner)]
    return list(inner or [])


def _moment_vectors(files: list[Path], states: list[dict[str, Any]], kind: str) -> RankTensors | None:
    """Return the vectors of one moment; None for an optimizer without it."""
    entries = [_entries(state) for state in states]
    if not all(entry and all(kind in vector for vector in entry) for entry in entries):
        return None
    return [(file, [vector[kind] for vector in entry]) for file, entry in zip(files, entries, strict=True)]


def _optimizer_steps(file: Path, state: dict[str, Any]) -> int | None:
    entries = _entries(state)
    return number_of(file, entries[0].get("step")) if entries else None


# --- places ----------------------------------------------------------------------------------------------------------


def _stages_1_and_2(
    folder: Path, shapes: list[dict[str, tuple[int, ...]]], ranks: RankTensors, states: list[dict[str, Any]]
) -> dict[str, Stored]:
    paddings = states[0].get("param_alignment_paddings") or [[0] * len(group) for group in shapes]
    placed: dict[str, Stored] = {}
    for index, group in enumerate(shapes):
        vectors = [(file, groups[index]) for file, groups in ranks]
        ends = list(accumulate(vector.numel() for _, vector in vectors))
        offset = 0
        for (name, shape), padding in zip(group.items(), paddings[index], strict=True):
            count = math.prod(shape)
            placed[name] = _tensor(folder, name, shape, vectors[0][1].dtype, _cut(vectors, ends, offset, count))
            offset += count + padding
        _check_all_used(folder, offset, ends[-1], 2 * len(ranks))
    return placed


def _stage_3(
    folder: Path, shapes: list[dict[str, tuple[int, ...]]], ranks: RankTensors, states: list[dict[str, Any]]
) -> dict[str, Stored]:
    vectors = [[(file, vector) for vector in groups] for file, groups in ranks]
    ends = [list(accumulate(vector.numel() for _, vector in of_rank)) for of_rank in vectors]
    placed: dict[str, Stored] = {}
    offset = 0
    for name, shape in ((name, shape) for group in shapes for name, shape in group.items()):
        count = math.prod(shape)
        share = -(-count // len(ranks))
        extents: list[Extent] = []
        for rank in range(len(ranks)):
            own = max(0, min(share, count - rank * share))
            extents += _cut(vectors[rank], ends[rank], offset, own)
        placed[name] = _tensor(folder, name, shape, vectors[0][0][1].dtype, extents)
        offset += share
    _check_all_used(folder, offset, ends[0][-1] if ends[0] else 0, 1)
    return placed


def _cut(vectors: list[tuple[Path, Tensor]], ends: list[int], offset: int, count: int) -> list[Extent]:
    """Return where `count` elements from `offset` on lie in vectors that are thought one after the other."""
    extents = []
    for (file, vector), end in zip(vectors, ends, strict=True):
        first, last = max(offset, end - vector.numel()), min(offset + count, end)
        if first < last:
            extents.append(flat_part(file, vector, first - (end - vector.numel()), last - first))
    return extents


def _tensor(folder: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype, extents: list[Extent]) -> StoredTensor:
    if sum(extent.count for extent in extents) != math.prod(shape):
        raise damaged(folder, f"the ranks' vectors end before {shown(name)} does")
    return StoredTensor(TensorSpec(dtype, shape), tuple(extents))


def _check_all_used(folder: Path, used: int, there: int, multiple: int) -> None:
    """Raise UsageError unless the parameters fill the vectors up to the padding at the end."""
    if -(-used // multiple) != -(-there // multiple):
        raise UsageError(
            f"{folder} holds vectors of {there} elements for parameters of {used}: it was written in a way that is not "
            "known here. Use DeepSpeed's own zero_to_fp32.py."
        )
