"""What a check found: a level, what was looked at, one sentence, and what to do about it."""

from dataclasses import asdict, dataclass
from typing import Literal

from enc.encoder.printable import printable

Level = Literal["green", "yellow", "red"]


@dataclass(frozen=True)
class Finding:
    """One result of a check; `fix` says what to do and is empty where there is nothing to do."""

    level: Level
    what: str
    text: str
    fix: str = ""

    def as_sentence(self) -> str:
        """Return it for a message: what, how it is, what to do."""
        fix = f" To mend it: {self.fix}." if self.fix else ""
        return f"{self.what}: {self.text.rstrip('.')}.{fix}"

    def as_dict(self) -> dict[str, str]:
        """Return it for JSON."""
        return asdict(self)


def green(what: str, text: str) -> Finding:
    """Return a finding that is fine, or a fact worth knowing."""
    return Finding("green", what, printable(text))


def yellow(what: str, text: str, fix: str) -> Finding:
    """Return a finding that may spoil a run, or that could not be checked."""
    return Finding("yellow", what, printable(text), printable(fix))


def red(what: str, text: str, fix: str = "") -> Finding:
    """Return a finding with which a run cannot work; without a fix the text ends in the instruction."""
    return Finding("red", what, printable(text), printable(fix))
