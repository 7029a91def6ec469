"""What an architecture says of its export: the transformers config, the code that loads it, and words for the card."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class ExportTarget:
    """A model of this package as one of transformers."""

    config: PreTrainedConfig
    model_class: type[PreTrainedModel]
    trained: Any  # a MaskedLanguageModel
    """The model of this package, to be filled with the weights."""
    vocabulary: tuple[str, ...]
    """Tensors with a row for each token."""
    longest: int
    """Tokens of the longest text."""
    tag: str
    """What the model card is filed under."""
    architecture: dict[str, str]
    """Rows of the model card."""
    code: Path | None = None
    """The modelling file to lay beside the weights, where transformers has no such model."""
    unseen_ids: tuple[int, ...] = ()
    """Ids that are in no text, since transformers takes them for padding."""
    form: str = ""
    """A sentence for who exports: what was written, and why not something simpler."""
