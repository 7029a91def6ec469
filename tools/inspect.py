"""What is inside a checkpoint of any format: counters, choices, and every tensor, read one at a time."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

from enc.encoder.checkpoints.folder import verify
from enc.encoder.config.schema import RunConfig
from enc.encoder.data.store import TokenStore
from enc.encoder.data.store_data import packed_rows
from enc.encoder.data.tokenizer import EncoderTokenizer
from enc.encoder.errors import UsageError
from enc.encoder.optim.state_spec import split_kind
from enc.encoder.printable import printable, shown
from enc.encoder.sizing.sizes import parameter_shapes
from enc.tools.own_config import own_config
from enc.tools.readers.detect import open_source
from enc.tools.readers.folders import is_ours
from enc.tools.readers.source import Source, Stored
from enc.tools.tensor_stats import stats_of


def inspect_checkpoint(path: Path) -> dict[str, Any]:
    """Return a checkpoint's format, state, counters, position in the data, main choices and tensors.

    A tensor is described by name, shape, dtype, bytes, norm and the number of its values that are not finite. Raises
    UsageError when the path cannot be read as a checkpoint; of ours, what is damaged is listed under `problems`.
    """
    found: dict[str, Any] = {"path": str(path), "state": "readable", "problems": []}
    ours = path.is_dir() and is_ours(path)
    if ours:
        status = verify(path)
        found.update(state=status.state, problems=status.problems)
    try:
        source = open_source(path)
    except UsageError as error:
        if not found["problems"]:
            raise
        raise UsageError(f"{path} is {found['state']}: {'; '.join(found['problems'])}. {error}") from None
    config = own_config(path) if ours else None
    return {
        **found,
        "format": source.format,
        "bytes": source.num_bytes,
        "counters": source.counters,
        "position": _position(config, source.counters) if config else None,
        "choices": _choices(config) if config else None,
        "tensors": {kind: _rows(tensors) for kind, tensors in _kinds(source).items()},
    }


def _kinds(source: Source) -> dict[str, dict[str, Stored]]:
    kinds: dict[str, dict[str, Stored]] = {"weights": source.weights}
    for name, stored in source.moments.items():
        kind, parameter = split_kind(name)
        kinds.setdefault(kind, {})[parameter] = stored
    return kinds


def _rows(tensors: dict[str, Stored]) -> list[dict[str, Any]]:
    rows = []
    for name in sorted(tensors):
        spec, stats = tensors[name].spec, stats_of(tensors[name].read())
        rows.append({
            "name": name, "shape": list(spec.shape), "dtype": str(spec.dtype).removeprefix("torch."),
            "bytes": spec.num_bytes, "norm": stats.norm if math.isfinite(stats.norm) else None,
            "non_finite": stats.non_finite,
        })  # fmt: skip
    return rows


# --- our runs --------------------------------------------------------------------------------------------------------


def _position(config: RunConfig, counters: dict[str, Any]) -> dict[str, Any]:
    """Return the rows read so far and, where the token store is at hand, the epoch and the row in it."""
    rows = counters.get("step", 0) * (config.trainer.global_batch_size or 0)
    position: dict[str, Any] = {"rows": rows}
    try:
        store = TokenStore.open(config.dataset.store)
        in_epoch = len(packed_rows(store, "train", EncoderTokenizer.load(store.tokenizer_dir), config))
        position.update(epoch=rows // in_epoch, row=rows % in_epoch, rows_per_epoch=in_epoch)
    except (UsageError, OSError):
        pass  # the store may be on another machine
    return position


def _choices(config: RunConfig) -> dict[str, str]:
    model, optimizer, trainer = config.model, config.optimizer, config.trainer
    head = "tied" if "decoder.weight" not in parameter_shapes(config) else "untied"
    return {
        "model": f"{model.type}, {model.num_hidden_layers} x {model.hidden_size}, {model.vocab_size} rows, {head} head",
        "optimizer": f"{optimizer.name}, lr {optimizer.lr:g}, weight decay {optimizer.weight_decay:g}",
        "schedule": f"{config.scheduler.name}, {trainer.max_steps} steps",
        "batch": f"{trainer.global_batch_size} rows of {config.row_length} tokens",
        "labels": f"{config.datacollator.mlm_probability:g} of the tokens",
    }


# --- text ------------------------------------------------------------------------------------------------------------


def inspection_text(found: dict[str, Any]) -> str:
    """Lay an inspection out for a terminal of 80 columns."""
    lines = [f"{printable(found['path'])}: {found['state']}, {found['format']}, {found['bytes'] / 1e6:.1f} MB"]
    lines += [f"  {printable(problem)}" for problem in found["problems"]]
    simple = {k: v for k, v in found["counters"].items() if isinstance(v, str | int | float)}
    lines += [f"  {shown(name):<18} {shown(value)}" for name, value in simple.items()]
    if position := found["position"]:
        lines.append(f"  {'rows read':<18} {position['rows']}{_epoch(position)}")
    lines += [f"  {name:<18} {printable(text)}" for name, text in (found["choices"] or {}).items()]
    for kind, rows in found["tensors"].items():
        total = sum(row["bytes"] for row in rows)
        lines += ["", f"{kind}: {len(rows)} tensors, {total / 1e6:.1f} MB"]
        lines += _tree(rows)
    return "\n".join(lines)


def _epoch(position: dict[str, Any]) -> str:
    if "epoch" not in position:
        return " (the token store is not at hand)"
    return f" (row {position['row']} of {position['rows_per_epoch']} in epoch {position['epoch']}, counted from 0)"


def _tree(rows: list[dict[str, Any]]) -> list[str]:
    """Return one line a tensor below one line for each new part of the dotted names above it."""
    lines: list[str] = []
    open_parts: list[str] = []
    below = Counter(prefix for row in rows for prefix in _prefixes(row["name"]))
    for row in rows:
        parts = row["name"].split(".")
        depth = sum(below[prefix] > 1 for prefix in _prefixes(row["name"]))  # a part with one tensor gets no line
        above, own = parts[:depth], ".".join(parts[depth:])
        common = next((i for i, part in enumerate(above) if open_parts[i : i + 1] != [part]), len(above))
        lines += [f"{'  ' * (depth + 1)}{shown(above[depth])}" for depth in range(common, len(above))]
        open_parts = above
        lines += _tensor_lines("  " * (len(above) + 1) + shown(own), row)
    return lines


def _prefixes(name: str) -> list[str]:
    """Return `a`, `a.b` for `a.b.c`."""
    parts = name.split(".")
    return [".".join(parts[:number]) for number in range(1, len(parts))]


def _tensor_lines(name: str, row: dict[str, Any]) -> list[str]:
    shape = "x".join(map(str, row["shape"])) or "scalar"
    norm = "not finite" if row["norm"] is None else f"{row['norm']:.4g}"
    line = f"{name:<30} {shape:>14} {row['dtype']:>9} {row['bytes']:>12} {norm:>10}"
    return [line, f"{'':>8}{row['non_finite']} values are NOT FINITE"] if row["non_finite"] else [line]
