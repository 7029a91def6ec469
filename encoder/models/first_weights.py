"""Starting a run from published weights (`model.init_from`), whatever the model.

A model that can do so names a module in its `Architecture`, with `check(folder, model, trains_tokenizer, num_tokens,
tokenizer_dir)`, `notes(folder, model)` and `load(module, folder, num_tokens)`. No torch but in `load`: a launch asks
the others before anything is written.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from enc.encoder.models.config import ModelConfig
from enc.encoder.models.registry import architecture_of

if TYPE_CHECKING:
    from torch import nn


def folder_of(model: ModelConfig) -> Path | None:
    """Return the folder that a model section names for its first weights, if it names one."""
    named = architecture_of(model).init_from(model)
    return Path(named) if named else None


def check(model: ModelConfig, trains_tokenizer: bool, num_tokens: int | None, tokenizer_dir: Path | None) -> None:
    """Compare the folder of `model.init_from` with the model and its tokenizer, as far as that is there already.

    Raises UsageError when the folder is not whole or does not go with them.
    """
    if folder := folder_of(model):
        _module(model).check(folder, model, trains_tokenizer, num_tokens, tokenizer_dir)


def notes(model: ModelConfig) -> list[str]:
    """Return what of the first weights does not come from the folder of `model.init_from`, a sentence each."""
    folder = folder_of(model)
    found: list[str] = _module(model).notes(folder, model) if folder else []
    return found


def load(module: "nn.Module", model: ModelConfig, num_tokens: int) -> None:
    """Fill a model with the weights that its section names, if it names any. Raises UsageError when they do not fit."""
    if folder := folder_of(model):
        _module(model).load(module, folder, num_tokens)


def _module(model: ModelConfig) -> Any:
    name = architecture_of(model).pretrained
    assert name is not None, "a model whose section names a folder has the module that reads it"
    return import_module(name)
