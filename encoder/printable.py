"""Text of strangers, such as the names in a checkpoint, made safe for a terminal and for JSON."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Say = Callable[[str], None]  # tells a person one paragraph


def once(say: Say) -> Say:
    """Return the same that tells each paragraph once."""
    told: set[str] = set()

    def say_once(text: str) -> None:
        if text not in told:
            told.add(text)
            say(text)

    return say_once


def printable(text: object, longest: int = 0) -> str:
    """Return a text with everything that does not print escaped, and its middle left out beyond `longest` characters.

    A name with an escape sequence could clear the screen, one with a line break could look like a line of ours.
    """
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    if not longest or len(escaped) <= longest:
        return escaped
    half = (longest - 1) // 2
    return f"{escaped[:half]}…{escaped[-half:]}"


def shown(name: object) -> str:
    """Return the name of a tensor or a key, printable and of at most a line and a half."""
    return printable(name, 120)


def jsonable(value: Any) -> Any:
    """Return a value as JSON can hold it: numbers that are not finite as text, keys as text."""
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def name_here(path: Path) -> str:
    """Return a path, relative to the working directory when it lies below."""
    return os.path.relpath(path) if path.absolute().is_relative_to(Path.cwd()) else str(path)
