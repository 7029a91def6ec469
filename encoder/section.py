"""What the sections of a run's config are made of: their base class, types of fields, and marks on fields."""

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


@dataclass(frozen=True)
class NoEffect:
    """Marks a field that is accepted but changes nothing; `why` is the reason shown in the warning."""

    why: str


@dataclass(frozen=True)
class KeepsNumbers:
    """Marks a key or section that decides where a run happens and what it shows, but not which numbers it computes."""


def yes_no(value: Any) -> Any:
    """Return the truth value that a word stands for, and anything else as it is."""
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    return words.get(value.lower(), value) if isinstance(value, str) else value


def _one_line(value: str) -> str:
    if not value.isprintable():
        raise ValueError("must be one line of printable characters")
    return value


Bool = Annotated[bool, BeforeValidator(yes_no)]
Count = Annotated[int, Field(ge=0)]
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
OpenFraction = Annotated[float, Field(gt=0, lt=1)]
Percent = Annotated[float, Field(ge=0, le=100)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Line = Annotated[str, Field(min_length=1), AfterValidator(_one_line)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)
