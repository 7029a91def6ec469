"""Keys that are set on the command line."""

from typing import Any

from enc.encoder.config.yaml_source import COMMAND_LINE, Source, parse_value, set_key
from enc.encoder.errors import UsageError


def parse_overrides(words: list[str]) -> dict[str, Any]:
    """Return ``{dotted key: value}`` of ``--a.b v``, ``--a.b=v`` and ``a.b=v``. Raises UsageError on anything else."""
    overrides: dict[str, Any] = {}
    rest = iter(words)
    for word in rest:
        key, equals, text = word.removeprefix("--").partition("=")
        if not equals:
            if not word.startswith("--") or not key:
                raise UsageError(f"{word!r} is neither an option nor an override; write section.key=value.")
            following = next(rest, None)
            if following is None or following.startswith("--"):
                raise UsageError(f"{word} has no value; write {word}=VALUE.")
            text = following
        if not all(key.split(".")):
            raise UsageError(f"{word!r} names no key; write section.key=value.")
        overrides[key] = parse_value(text)
    return overrides


def apply_overrides(source: Source, overrides: dict[str, Any]) -> None:
    for key, value in overrides.items():
        set_key(source.tree, key, value)
        for below in [k for k in source.places if k.startswith(f"{key}.")]:
            del source.places[below]
        source.places[key] = COMMAND_LINE
