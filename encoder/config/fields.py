"""The schema as a list of dotted keys."""

from collections.abc import Iterator
from typing import get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from enc.encoder.config.schema import RunConfig


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
