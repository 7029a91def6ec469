"""The models that there are. No torch: a model's class is imported when one is built."""

from enc.encoder.models.architecture import Architecture, Parameter
from enc.encoder.models.config import ModelConfig
from enc.encoder.models.mpnet.architecture import MPNET
from enc.encoder.models.neobert.architecture import NEOBERT

ARCHITECTURES = {architecture.name: architecture for architecture in (NEOBERT, MPNET)}
"""By the value of `model.type`; the first is the default."""


def architecture_of(config: ModelConfig) -> Architecture:
    """Return the record of the model that a config section describes."""
    return ARCHITECTURES[config.type]


def parameters_of(config: ModelConfig) -> dict[str, Parameter]:
    """Return every trained parameter of the model that a config section describes."""
    return architecture_of(config).parameters(config)
