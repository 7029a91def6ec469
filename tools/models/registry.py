"""What tools know of each model, by the name of its `Architecture`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enc.encoder.data.tokenizer import EncoderTokenizer
from enc.encoder.models.config import ModelConfig
from enc.encoder.models.registry import ARCHITECTURES
from enc.encoder.optim.config import OptimizerConfig
from enc.tools.models.export_target import ExportTarget
from enc.tools.models.fitting import ModelState
from enc.tools.models.mpnet.export import mpnet_target
from enc.tools.models.mpnet.names import hub_keys as mpnet_keys
from enc.tools.models.mpnet.names import mpnet_state
from enc.tools.models.neobert.export import neobert_target
from enc.tools.models.neobert.names import hub_keys as neobert_keys
from enc.tools.models.neobert.names import neobert_state
from enc.tools.readers.source import Source


@dataclass(frozen=True)
class ModelTools:
    """How a model leaves for transformers, and how its checkpoints of other programs come in."""

    export_target: Callable[[Any, Path, int], ExportTarget]
    """The model of this package as one of transformers: of a model section, a tokenizer's folder and its tokens."""
    state: Callable[[Source, Any, EncoderTokenizer, OptimizerConfig], ModelState]
    """The tensors of a source under this package's names, moments as an optimizer keeps them."""
    hub_keys: Callable[[dict[str, Any], Path], dict[str, Any]]
    """The keys of the model section that the content of a config.json stands for."""


TOOLS = {
    "neobert": ModelTools(neobert_target, neobert_state, neobert_keys),
    "mpnet": ModelTools(mpnet_target, mpnet_state, mpnet_keys),
}


def tools_of(config: ModelConfig) -> ModelTools:
    """Return what tools know of the model that a config section describes."""
    return TOOLS[config.type]


def tools_of_hub_config(found: dict[str, Any]) -> ModelTools:
    """Return what tools know of the model that a config.json describes; those of NeoBERTs do not tell their type."""
    named = found.get("model_type")
    known = (name for name, architecture in ARCHITECTURES.items() if named in architecture.hub_types)
    return TOOLS[next(known, "neobert")]
