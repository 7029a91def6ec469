"""The configuration reference, made from the schema: docs/configuration.md is the output of this module."""

import types
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from enc.encoder.config import not_built
from enc.encoder.config.fields import mark_of, section_classes
from enc.encoder.config.schema import RunConfig
from enc.encoder.section import NoEffect

_INTRO = """# Configuration

*This page is the output of `enc config schema --markdown`.*

A config is a YAML file of sections. Every key has a default, so a file names only what differs; `enc config show CFG`
prints all of them filled in, `enc config check CFG` reports every problem at once. Any key can also be set on the
command line, in three spellings: `--trainer.max_steps 100`, `--trainer.max_steps=100`, `trainer.max_steps=100`.

Numbers may be written `1e-4`. A top-level mapping `variables:` holds values for reuse: `$variables.name` as a whole
value keeps its type, `${variables.name}` inside a text is replaced. The key names are NeoBERT's; its old names are
accepted with a note. A key marked *no effect* is accepted and ignored, for the reason given; names of features that
are not built yet, listed at the end, are refused.
"""


def configuration_page() -> str:
    """Return the reference page as Markdown."""
    parts = [_INTRO, "## Top level\n", _table(RunConfig)]
    for name, info in RunConfig.model_fields.items():
        sections = section_classes(info)
        if len(sections) > 1:
            parts += [f"## {name}\n", "The encoder's architecture; `type` decides which keys there are.\n"]
            parts += [f"### {kind.__doc__}\n\n{_table(kind)}" for kind in sections]
            continue
        for section in sections:
            parts += [f"## {name}\n", f"{section.__doc__}\n", _table(section)]
            parts += [
                f"### {name}.{inner}\n\n{kind.__doc__}\n\n{_table(kind)}"
                for inner, field in section.model_fields.items()
                for kind in section_classes(field)
            ]
    return "\n".join([*parts, _not_built()])


def _table(section: Any) -> str:
    rows = [
        f"| `{name}` | {_type(info)} | `{_default(info)}` | {_text(info)} |"
        for name, info in section.model_fields.items()
        if section is not RunConfig or not section_classes(info)
    ]
    return "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows, ""])


def _default(info: FieldInfo) -> str:
    value = info.get_default(call_default_factory=True)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value)) if isinstance(value, tuple) else f"{value:.6g}" if isinstance(value, float) else str(value)


def _text(info: FieldInfo) -> str:
    text = (info.description or "").replace("\n", " ").replace("|", "\\|")
    no_effect = mark_of(info, NoEffect)
    return f"{text} *No effect: {no_effect.why}.*" if no_effect else text


def _not_built() -> str:
    keys = [key for keys in not_built.KEYS.values() for key in keys]
    keys = [f"`{key}`" for key in keys if key.partition(".")[0] not in not_built.SECTIONS]
    values = [f"`{key}: {value}`" for key, features in not_built.VALUES.items() for value in features]
    return (
        "## Not built yet\n\nKnown by name and refused, unless a key has the value that asks for nothing:\n\n"
        f"- sections {', '.join(f'`{section}`' for section in not_built.SECTIONS)};\n"
        f"- keys {', '.join(keys)};\n"
        f"- values {', '.join(values)}.\n"
    )


def _type(info: FieldInfo) -> str:
    return _type_name(info.annotation, info.metadata)


def _type_name(kind: Any, metadata: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " \\| ".join(str(value) for value in arguments)
    if origin in (types.UnionType, getattr(types, "UnionType", None)) or str(origin) == "typing.Union":
        return " \\| ".join(_type_name(part, metadata) for part in arguments)
    if hasattr(kind, "__metadata__"):
        return _type_name(arguments[0], kind.__metadata__)
    if origin in (tuple, list, dict):
        return {tuple: "list", list: "list", dict: "mapping"}[origin]
    if kind is type(None):
        return "null"
    names = {int: "integer", float: "number", bool: "true \\| false", str: "text"}
    return names.get(kind, "section") + _range(metadata)


def _range(metadata: Any) -> str:
    bounds = []
    for mark in metadata:
        for item in getattr(mark, "metadata", [mark]):
            signs = {Ge: "≥", Gt: ">", Le: "≤", Lt: "<"}
            for kind, sign in signs.items():
                if isinstance(item, kind):
                    bounds.append(f"{sign} {getattr(item, kind.__name__.lower()):g}")
    return f", {' and '.join(bounds)}" if bounds else ""
