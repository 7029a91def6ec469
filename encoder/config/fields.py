"""The schema as a list of dotted keys."""

import functools
from collections.abc import Iterator
from typing import TypeVar, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from enc.encoder.config.schema import RunConfig
from enc.encoder.section import KeepsNumbers

Mark = TypeVar("Mark")


def all_fields(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every dotted key of the schema with its field, once; sections come before their keys."""
    for name, info in model.model_fields.items():
        yield f"{prefix}{name}", info
        inner: dict[str, FieldInfo] = {}
        for kind in section_classes(info):
            inner = dict(all_fields(kind, f"{prefix}{name}.")) | inner
        yield from inner.items()


def section_classes(info: FieldInfo) -> list[type[BaseModel]]:
    """Return the section classes that a field may have, several for the models' section; none for a plain value."""
    kinds = [getattr(kind, "__origin__", kind) for kind in (info.annotation, *get_args(info.annotation))]
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]


def mark_of(info: FieldInfo, kind: type[Mark]) -> Mark | None:
    """Return the mark of a kind on a field, if there is one."""
    return next((mark for mark in info.metadata if isinstance(mark, kind)), None)


def keeps_numbers(key: str) -> bool:
    """Tell whether a change of this dotted key leaves data, masks and maths of the run the same."""
    return any(f"{key}.".startswith(f"{free}.") for free in _keys_that_keep_numbers())


@functools.cache
def _keys_that_keep_numbers() -> list[str]:
    return [key for key, info in all_fields() if mark_of(info, KeepsNumbers)]
