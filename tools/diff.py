"""What differs between two checkpoints: their tensors, read pair by pair, and their configs."""

from dataclasses import asdict
from typing import Any

from enc.encoder.config.schema import flatten
from enc.encoder.errors import UsageError
from enc.encoder.printable import shown
from enc.tools.readers.source import Source
from enc.tools.tensor_stats import difference_of


def diff_sources(a: Source, b: Source) -> dict[str, Any]:
    """Compare two sources.

    Returns `only_in_a` and `only_in_b` (names), `other_kind` (name: shape and dtype of both; values are compared too
    where the shapes agree), `different` (name, max_abs, relative, …), `num_equal` (tensors with the same bits) and
    `config` ({dotted key: [a, b]}, None unless both have one).

    Raises:
        UsageError: The two have not one name in common.
    """
    first, second = a.tensors, b.tensors
    both = [name for name in first if name in second]
    if not both:
        examples = f"{shown(min(first))} and {shown(min(second))}"
        raise UsageError(
            f"{a.path} and {b.path} have no tensor name in common (for example {examples}). They are not checkpoints "
            "of the same model."
        )
    found: dict[str, Any] = {
        "only_in_a": sorted(first.keys() - second.keys()),
        "only_in_b": sorted(second.keys() - first.keys()),
        "other_kind": [], "different": [], "num_equal": 0, "config": _config_changes(a.config, b.config),
    }  # fmt: skip
    for name in both:
        one, other = first[name].spec, second[name].spec
        if one != other:
            found["other_kind"].append({"name": name, "a": _kind(one), "b": _kind(other)})
        if one.shape != other.shape:
            continue
        difference = difference_of(first[name].read(), second[name].read())
        if difference.same_bits:
            found["num_equal"] += 1
        else:
            found["different"].append({"name": name, **asdict(difference)})
    return found


def _kind(spec: Any) -> str:
    return f"{'x'.join(map(str, spec.shape)) or 'scalar'} {str(spec.dtype).removeprefix('torch.')}"


def _config_changes(a: dict[str, Any] | None, b: dict[str, Any] | None) -> dict[str, list[Any]] | None:
    if a is None or b is None:
        return None
    try:
        before, after = flatten(a), flatten(b)
    except RecursionError:  # an anchor of YAML can hold itself
        raise UsageError("A config holds itself, so the two cannot be compared. Remove config.yaml from one.") from None
    keys = dict.fromkeys([*before, *after])
    return {key: [before.get(key), after.get(key)] for key in keys if not _same(before.get(key), after.get(key))}


def _same(a: Any, b: Any) -> bool:
    """Compare two values of a config; one that is not a number equals itself."""
    return bool(a == b) or repr(a) == repr(b)


def is_equal(found: dict[str, Any]) -> bool:
    """Tell whether a comparison found nothing."""
    return not any(found[key] for key in ("only_in_a", "only_in_b", "other_kind", "different", "config"))


def diff_text(found: dict[str, Any]) -> str:
    """Lay a comparison out for a terminal of 80 columns."""
    lines = [f"only in A: {shown(name)}" for name in found["only_in_a"]]
    lines += [f"only in B: {shown(name)}" for name in found["only_in_b"]]
    lines += [f"{shown(row['name'])}: {row['a']} in A, {row['b']} in B" for row in found["other_kind"]]
    if found["different"]:
        lines.append(f"{'different':<48} {'max |a - b|':>13} {'of largest':>13}")
    for row in found["different"]:
        lines.append(f"  {shown(row['name']):<46} {row['max_abs']:>13.4g} {row['relative']:>13.4g}")
        if row["unlike_non_finite"]:
            lines.append(f"{'':4}{row['unlike_non_finite']} values are not finite in one of the two")
    for key, (before, after) in (found["config"] or {}).items():
        lines.append(f"config {shown(key)}: {shown(repr(before))} -> {shown(repr(after))}")
    if found["config"] is None:
        lines.append("configs not compared: not both have one")
    lines.append(f"{found['num_equal']} tensors are equal bit for bit, {len(found['different'])} differ")
    return "\n".join(lines)
