"""What an architecture says of its export: the transformers config, the code that loads it, and words for the card."""

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from enc.encoder.models import modeling_common

HEADS = ("MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice")


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
    code: tuple[Path, ...] = ()
    """The modelling files to lay beside the weights, where transformers has no such model."""
    unseen_ids: tuple[int, ...] = ()
    """Ids that are in no text, since transformers takes them for padding."""
    form: str = ""
    """A sentence for who exports: what was written, and why not something simpler."""


def modeling_files(module: ModuleType) -> tuple[Path, ...]:
    """Return a modelling file and the one that it imports."""
    return tuple(Path(str(each.__file__)) for each in (module, modeling_common))


def auto_map(module: ModuleType, prefix: str) -> dict[str, str]:
    """Return what makes the Auto classes find the classes of a modelling file, whose names begin with `prefix`."""
    names = {"AutoConfig": "Config", "AutoModel": "Model"} | {f"AutoModelFor{head}": f"For{head}" for head in HEADS}
    file = Path(str(module.__file__)).stem
    return {auto: f"{file}.{prefix}{name}" for auto, name in names.items()}
