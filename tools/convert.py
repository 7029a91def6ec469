"""Checkpoints of any format as a DeepSpeed universal folder, a DCP folder or safetensors, moments included."""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from enc.encoder.checkpoints.tensor_file import TensorSpec
from enc.encoder.errors import UsageError
from enc.encoder.files import write_json
from enc.encoder.optim.state_spec import ADAM_STATE, StateSpec, split_kind, state_spec
from enc.encoder.printable import shown
from enc.tools.consolidate import DTYPES, Written, output_specs, refuse_unwritable, write_file
from enc.tools.output import new_output
from enc.tools.own_config import own_config
from enc.tools.readers.folders import MOMENTS_FILE
from enc.tools.readers.names import BUFFERS
from enc.tools.readers.source import Source, is_file_name

_TAG = "universal"
_DEEPSPEED = "0.19.8"  # the version whose universal format is written


def convert(source: Source, to: str, out: Path, dtype: str | None) -> Written:
    """Write a source to the folder `out` as "universal", "dcp" or "safetensors".

    `dtype` is of the weights, "fp32", "bf16" or None for each tensor's own; moments stay as they are. Raises UsageError
    when the source lacks what the format needs (universal: what the source's optimizer keeps for every weight, but for
    buffers and second names of tied weights), `out` is taken, or an argument is not one of these.
    """
    if to not in _WRITERS:
        raise UsageError(f"--to is {to!r}; allowed: {', '.join(_WRITERS)}.")
    specs = output_specs(source.weights, dtype)
    moments = output_specs(source.moments, None)
    left_out: tuple[str, ...] = ()
    _refuse_nameless(source, to)
    if to == "safetensors":
        refuse_unwritable({**specs, **moments})
    elif to == "universal":
        _refuse_paths(source)
        left_out = _without_moments(source)
        specs = {name: TensorSpec(torch.float32, spec.shape) for name, spec in specs.items()}
    written = [*(spec for name, spec in specs.items() if name not in left_out), *moments.values()]
    num_bytes = sum(spec.num_bytes for spec in written)
    with new_output(out, num_bytes) as partial:
        _WRITERS[to](source, partial, dtype)
        num_files = sum(p.is_file() for p in partial.rglob("*"))
    return Written(out, len(written), num_bytes, num_files, left_out)


def _refuse_nameless(source: Source, to: str) -> None:
    if to != "safetensors" and any("#" in name for name in source.moments):
        raise UsageError(
            f"{source.path}: its optimizer numbers the parameters, so whose moments they are is not known. `enc ckpt "
            "import` knows NeoBERT's order; `--to safetensors` writes them under their numbers."
        )
    if to == "universal" and not source.moments:
        raise UsageError(
            f"{source.path} has no optimizer moments, which DeepSpeed needs in a universal folder. Use `--to "
            "safetensors` and load the weights before deepspeed.initialize."
        )


def _spec(source: Source) -> StateSpec:
    """Return what the optimizer of a checkpoint keeps: ours names it in its config, those of others have AdamW's."""
    config = own_config(source.path) if source.format == "enc" else None
    return state_spec(config.optimizer, config.parameters) if config else ADAM_STATE


def _missing(source: Source) -> dict[str, list[str]]:
    """Return the kinds of moments that each weight of a checkpoint lacks, in its own shape."""
    spec = _spec(source)
    kept = {name: spec.state_of(name, tuple(weight.spec.shape)) for name, weight in source.weights.items()}
    return {name: [kind for kind in kinds if not _fits(source, kind, name)] for name, kinds in kept.items()}


def _without_moments(source: Source) -> tuple[str, ...]:
    """Return the weights that have no moments because none are trained: buffers, and second names of tied weights.

    Raises UsageError when any other weight lacks one, or a moment belongs to no weight of its shape.
    """
    missing = _missing(source)
    trained = {name for name in missing if not missing[name]}
    lacking = [
        f"{kind} of {shown(name)}"
        for name, kinds in missing.items()
        if kinds and not _needs_none(source, name, trained)
        for kind in kinds
    ]
    lacking += [f"the weight of {shown(m)}" for m in source.moments if split_kind(m)[1] not in trained]
    if lacking:
        more = f" and {len(lacking) - 4} more" if len(lacking) > 4 else ""
        raise UsageError(
            f"{source.path} lacks {', '.join(lacking[:4])}{more}, in the same shape. An optimizer could not go on "
            "from it. Use `--to dcp` or `--to safetensors`, which write what there is."
        )
    return tuple(name for name in source.weights if name not in trained)


def _fits(source: Source, kind: str, name: str) -> bool:
    moment = source.moments.get(f"{kind}.{name}")
    return moment is not None and moment.spec.shape == source.weights[name].spec.shape


def _needs_none(source: Source, name: str, trained: set[str]) -> bool:
    """Tell whether a weight is a buffer, or has the values of a weight that is trained."""
    weight = source.weights[name]
    if any(split_kind(moment)[1] == name for moment in source.moments):
        return False
    if name in source.buffers or BUFFERS.fullmatch(name) or not weight.spec.dtype.is_floating_point:
        return True
    alike = [source.weights[other] for other in trained if source.weights[other].spec == weight.spec]
    if any(other is weight for other in alike):
        return True
    values = weight.read() if alike else torch.empty(0)
    is_constant = not values.numel() or bool((values == values.flatten()[0]).all())  # as norms and biases begin
    return not is_constant and any(torch.equal(other.read(), values) for other in alike)


def _weight(source: Source, name: str, dtype: str | None) -> Tensor:
    tensor = source.weights[name].read()
    return tensor.to(DTYPES[dtype]) if dtype and tensor.is_floating_point() else tensor


def _step(source: Source) -> int | None:
    """Return the number of updates of the moments, as far as it is known."""
    updates = source.counters.get("optimizer_steps")
    return source.counters.get("step") if updates is None else updates


# --- formats ---------------------------------------------------------------------------------------------------------


def _write_safetensors(source: Source, folder: Path, dtype: str | None) -> None:
    write_file(folder / "model.safetensors", source.weights, output_specs(source.weights, dtype))
    if source.moments:
        write_file(folder / MOMENTS_FILE, source.moments, output_specs(source.moments, None))
    kept = {key: source.counters[key] for key in ("step", "optimizer_steps") if source.counters.get(key) is not None}
    write_json(folder / "trainer_state.json", kept)


def _write_universal(source: Source, folder: Path, dtype: str | None) -> None:
    """Write what `load_checkpoint` reads with `checkpoint.load_universal` at any stage and number of ranks.

    Weights come from `zero/`, so the file of model states holds counters only. DeepSpeed pairs the groups of its
    optimizer with `param_groups` and takes over every setting that it finds there; as many empty ones as there are
    parameters leave the settings of the new run alone, however many groups it has.
    """
    tag, step, spec = folder / _TAG, torch.tensor(float(_step(source) or 0)), _spec(source)
    trained = [name for name, missing in _missing(source).items() if not missing]
    for name in trained:
        place, shape = tag / "zero" / name, tuple(source.weights[name].spec.shape)
        place.mkdir(parents=True)
        _save_param(place / "fp32.pt", _weight(source, name, dtype).float())
        for kind in spec.state_of(name, shape):
            _save_param(place / f"{kind}.pt", source.moments[f"{kind}.{name}"].read())
        if spec.counts_steps(name):
            torch.save(step, place / "step.pt")
    groups: list[dict[str, Any]] = [{} for _ in trained]
    inner = {"state": {0: {"step": step}}, "param_groups": groups}
    optimizer = {"ds_version": _DEEPSPEED, "param_groups": groups, "optimizer_state_dict": inner}
    torch.save(optimizer, tag / "zero" / "optimizer_state.pt")
    taken_steps = source.counters.get("step")
    counters: dict[str, Any] = {
        "module": {}, "global_steps": int(step) if taken_steps is None else int(taken_steps), "skipped_steps": 0,
        "dp_world_size": 1, "mp_world_size": 1, "lr_scheduler": None, "ds_version": _DEEPSPEED,
        "universal_checkpoint_info": {},
    }  # fmt: skip
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):  # stages 1 and 2; stage 3
        torch.save(counters, tag / name)
    (folder / "latest_universal").write_text(_TAG)


def _refuse_paths(source: Source) -> None:
    for name in source.weights:
        if not is_file_name(name) or len(name.encode(errors="replace")) > 255 or not name.isprintable():
            raise UsageError(f"A parameter is named '{shown(name)}', which cannot be a folder. Use another --to.")


def _save_param(path: Path, tensor: Tensor) -> None:
    torch.save({"param": tensor, "cat_dim": 0}, path)


def _write_dcp(source: Source, folder: Path, dtype: str | None) -> None:
    """Write `model.<name>` and `optim.state.<name>.<moment>`, the names that get_state_dict gives."""
    reads: dict[str, Callable[[], Tensor]] = {}
    specs = output_specs(source.weights, dtype)
    state: dict[str, Any] = {"model": {}, "optim": {"state": {}}}
    for name, spec in specs.items():
        state["model"][name] = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        reads[f"model.{name}"] = partial(_weight, source, name, dtype)
    optimizer = _spec(source)
    for moment, stored in source.moments.items():
        kind, name = split_kind(moment)
        entry = state["optim"]["state"].setdefault(name, {})
        entry[kind] = torch.empty(stored.spec.shape, dtype=stored.spec.dtype, device="meta")
        reads[f"optim.state.{name}.{kind}"] = stored.read
        if (step := _step(source)) is not None and optimizer.counts_steps(name):
            entry["step"] = torch.tensor(float(step))
    if not source.moments:
        del state["optim"]
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # that it runs in a single process
            state_dict_saver.save(state, checkpoint_id=folder, planner=_ReadingPlanner(reads), no_dist=True)
    except CheckpointException as error:  # a BaseException, with the cause of each rank in it
        raise next((cause for cause, _ in error.failures.values()), error) from None


class _ReadingPlanner(DefaultSavePlanner):
    """Plans with tensors that have no values and reads each one when it is written."""

    def __init__(self, reads: dict[str, Callable[[], Tensor]]) -> None:
        super().__init__()
        self.reads = reads

    def resolve_data(self, write_item: WriteItem) -> Any:
        if write_item.type == WriteItemType.BYTE_IO or write_item.index.fqn not in self.reads:
            return super().resolve_data(write_item)
        return self.reads[write_item.index.fqn]()


_WRITERS: dict[str, Callable[[Source, Path, str | None], None]] = {
    "universal": _write_universal,
    "dcp": _write_dcp,
    "safetensors": _write_safetensors,
}
