"""Named lines laid out for a terminal."""

import textwrap


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
