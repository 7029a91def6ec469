"""References to the `variables:` mapping of a config."""

import re
from typing import Any

from enc.encoder.config.yaml_source import Problem, Source, get_key
from enc.encoder.spelling import did_you_mean

_WHOLE = re.compile(r"^\$variables\.([\w.]+)$|^\$\{variables\.([\w.]+)\}$|^\{\$variables\.([\w.]+)\}$")
_INLINE = re.compile(r"\$\{variables\.([\w.]+)\}|\{\$variables\.([\w.]+)\}")


def substitute_variables(source: Source) -> None:
    """Replace references to the `variables:` mapping: a whole-string one keeps its type, one in a text becomes text."""
    variables = source.tree.pop("variables", None) or {}
    if not isinstance(variables, dict):
        text = f"is {variables!r}, must be a section of name: value lines"
        source.problems.append(Problem("variables", text, source.place("variables")))
        variables = {}
    source.tree = _substituted(source.tree, variables, source, "", ())


def _substituted(value: Any, variables: dict[str, Any], source: Source, key: str, trail: tuple[str, ...]) -> Any:
    if isinstance(value, dict):
        return {k: _substituted(v, variables, source, f"{key}.{k}" if key else str(k), trail) for k, v in value.items()}
    if isinstance(value, list):
        return [_substituted(v, variables, source, key, trail) for v in value]
    if not isinstance(value, str):
        return value

    def look_up(name: str) -> Any:
        found, result = get_key(variables, name)
        if name in trail:
            text = f"refers to itself: {' -> '.join((*trail[trail.index(name) :], name))}"
        elif not found:
            text = f"refers to variables.{name}, which is not defined{did_you_mean(name, _names(variables))}"
        else:
            return _substituted(result, variables, source, key, (*trail, name))
        source.problems.append(Problem(key, text, source.place(key)))
        return None

    whole = _WHOLE.match(value)
    if whole:
        return look_up(next(group for group in whole.groups() if group))
    return _INLINE.sub(lambda match: str(look_up(match[1] or match[2])), value)


def _names(tree: dict[str, Any], prefix: str = "") -> list[str]:
    inner = [name for k, v in tree.items() if isinstance(v, dict) for name in _names(v, f"{prefix}{k}.")]
    return [f"{prefix}{k}" for k in tree] + inner
