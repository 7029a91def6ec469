"""Prose on a terminal breaks between words."""

import io

import pytest

from enc.encoder.text_table import fitted


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_prose_breaks_between_words_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but blanks becomes a line's end, so that names can be copied; what is no terminal gets it as it is."""
    monkeypatch.setenv("COLUMNS", "40")
    text = "There is no checkpoint /a/very-long/path-of-more/than-forty/columns-of-a/terminal in this place.\n  - a-b c"
    shown = fitted(text, Terminal())
    assert shown.split() == text.split()
    assert "\n  - a-b c" in shown
    assert all(len(line) <= 40 or " " not in line.strip() for line in shown.splitlines())
    assert fitted(text, io.StringIO()) == text
