"""From YAML and command-line words to a `RunConfig`, with every problem of the input reported together.

read (lines, duplicate keys) -> old names -> overrides -> variables -> not built -> site -> sections -> rules
-> RunConfig | UsageError
"""

import functools
import operator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from enc.encoder.config.checks import rule_problems
from enc.encoder.config.fields import all_fields, mark_of
from enc.encoder.config.messages import message_of, raise_problems
from enc.encoder.config.not_built import take_out_not_built
from enc.encoder.config.old_names import apply_old_names
from enc.encoder.config.overrides import apply_overrides
from enc.encoder.config.schema import RunConfig
from enc.encoder.config.sites import find_config, lay_site_under
from enc.encoder.config.variables import substitute_variables
from enc.encoder.config.yaml_source import Problem, Source, read_config_text, read_yaml
from enc.encoder.errors import UsageError
from enc.encoder.section import NoEffect


@dataclass(frozen=True)
class Loaded:
    """A valid config, and what the user should be told about it."""

    config: RunConfig
    warnings: list[str]


def _validate(source: Source) -> tuple[RunConfig, set[str]]:
    """Return the config with every bad value at its default, and the keys that were bad."""
    bad = {problem.key for problem in source.problems}
    tree = source.tree
    while True:
        try:
            return RunConfig.model_validate(tree), bad
        except ValidationError as error:
            # all paths first: a key with two errors is gone from the tree when the second one is looked at
            for item, path in [(item, _known_path(tree, item["loc"])) for item in error.errors()]:
                key = ".".join(map(str, path))
                if key not in bad:
                    bad.add(key)
                    source.problems.append(Problem(key, message_of(item, path), source.place(key)))
                *parents, last = path
                section: Any = functools.reduce(operator.getitem, parents, tree)  # type: ignore[arg-type]
                section.pop(last, None)


def _known_path(tree: dict[str, Any], loc: tuple[str | int, ...]) -> list[str | int]:
    """Cut a pydantic location to the part that names a key of the tree (it goes on into lists and unions).

    In the section `model` pydantic puts the model's type between section and key.
    """
    path: list[str | int] = []
    node: Any = tree
    for part in (*loc[:1], *loc[2:]) if loc[0] == "model" else loc:
        if not isinstance(node, dict) or part not in node:
            break
        path.append(part)
        node = node[part]
    return path or list(loc[:1])


def _warn_of_no_effect(config: RunConfig, source: Source) -> None:
    """Warn about values that change nothing."""
    for key, info in all_fields():
        mark = mark_of(info, NoEffect)
        if mark and source.place(key) and _value(config, key, info.default) != info.default:
            source.warnings.append(f"{key} has no effect: {mark.why}.")


def _value(config: RunConfig, key: str, default: Any) -> Any:
    """Return the value of a dotted key, or `default` where the config has another section in its place."""
    return functools.reduce(lambda section, name: getattr(section, name, default), key.split("."), config)


def load_config(name: str, overrides: dict[str, Any] | None = None) -> Loaded:
    """Load a config file or a recipe and apply overrides ``{dotted key: value}``.

    Raises UsageError that lists every problem: file and line, key, what was given, what is allowed.
    """
    path = find_config(name)
    source = _read_source(read_config_text(path), str(path), overrides)
    lay_site_under(source)
    return _checked(source)


def load_run(run_dir: Path) -> RunConfig:
    """Load the config of a run folder. Raises UsageError when it cannot be read or is not valid."""
    path = run_dir / "config.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path} cannot be read: {error}. It is the run's own config; take it from a checkpoint."
        ) from None
    return load_text(text, str(path)).config


def load_text(text: str, name: str, overrides: dict[str, Any] | None = None) -> Loaded:
    """Load a config from YAML text, without a site profile; `name` stands for it in messages.

    Raises UsageError as `load_config` does.
    """
    return _checked(_read_source(text, name, overrides))


def _read_source(text: str, name: str, overrides: dict[str, Any] | None) -> Source:
    source = read_yaml(text, name)
    apply_old_names(source)
    apply_overrides(source, overrides or {})
    apply_old_names(source)  # an override may use an old name too
    substitute_variables(source)
    take_out_not_built(source)
    return source


def _checked(source: Source) -> Loaded:
    config, bad = _validate(source)
    _warn_of_no_effect(config, source)
    for keys, sentence in rule_problems(config):
        if not bad.intersection(keys):
            source.problems.append(Problem(keys[0], sentence, source.place(keys[0])))
    raise_problems(source.name, source.problems)
    return Loaded(config, source.warnings)
