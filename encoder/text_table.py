"""Named lines laid out for a terminal."""

import shutil
import textwrap
from typing import TextIO


def table(lines: list[tuple[str, str]], width: int = 80) -> str:
    """Lay out (name, text) lines, names right-aligned, long texts wrapped under themselves."""
    column = max(len(name) for name, _ in lines)
    hanging = " " * (column + 2)
    return "\n".join(
        textwrap.fill(
            text, width, initial_indent=f"{name:>{column}}  ", subsequent_indent=hanging, break_on_hyphens=False
        )
        for name, text in lines
    )


def fitted(text: str, stream: TextIO, longest: int = 100) -> str:
    """Break prose between words where `stream` is a terminal, which would break inside them; lines stay lines."""
    if not stream.isatty():
        return text
    width = min(shutil.get_terminal_size().columns, longest)
    return "\n".join(_broken(line, width) for line in text.split("\n"))


def _broken(line: str, width: int) -> str:
    indent = line[: len(line) - len(line.lstrip())]
    return textwrap.fill(
        line.strip(), width, initial_indent=indent, subsequent_indent=indent, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
