"""The keys of the installed DeepSpeed with the kinds of their values.

    python tests/support/deepspeed_keys.py > ds_configs/keys.json

DeepSpeed checks the keys of a section with pydantic but ignores unknown top-level ones. The former are read off its
models, the latter are noted while `DeepSpeedConfig` looks for them. A kind is bool, int, float, str, list, any, or a
mapping.
"""

import json
import logging
import os
import types
from enum import Enum
from typing import Any, Union, get_args, get_origin

os.environ["DS_ACCELERATOR"] = "cpu"
logging.disable(logging.WARNING)

from deepspeed.comm.config import CommsLoggerConfig  # noqa: E402
from deepspeed.monitor import config as monitor  # noqa: E402
from deepspeed.runtime import config as runtime  # noqa: E402
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config  # noqa: E402
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # noqa: E402
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig  # noqa: E402
from pydantic import BaseModel  # noqa: E402

MODELS: dict[str, type[BaseModel]] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "bf16": DeepSpeedBF16Config,
    "bfloat16": DeepSpeedBF16Config,
    "fp16": DeepSpeedFP16Config,
    "comms_logger": CommsLoggerConfig,
    "tensorboard": monitor.TensorBoardConfig,
    "wandb": monitor.WandbConfig,
    "csv_monitor": monitor.CSVConfig,
    "comet": monitor.CometConfig,
    "compile": runtime.CompileConfig,
}
RECORDED = ("data_types", "flops_profiler", "torch_autocast", "aio")  # sections that DeepSpeed reads without a model


class Recorder(dict):
    """A mapping that notes which keys it is asked for, with the kind of their default."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.asked: dict[str, str] = {}

    def get(self, key: str, default: Any = None) -> Any:
        plain = type(default) in (bool, int, float, str) and default != "auto"
        self.asked[key] = type(default).__name__ if plain else "any"
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.setdefault(str(key), "any")
        return super().__contains__(key)

    def keys(self) -> Any:
        return self


def model_keys(model: type[BaseModel]) -> dict[str, Any]:
    """Return the keys of a pydantic model, under the names that its documentation uses."""
    return {info.alias or name: _kind(info.annotation) for name, info in model.model_fields.items()}


def _kind(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, types.UnionType):
        inner = [kind for kind in get_args(annotation) if kind is not type(None)]
        return _kind(inner[0]) if len(inner) == 1 else "any"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return model_keys(annotation)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return annotation.__base__.__name__ if annotation.__base__ is int else annotation.__mro__[1].__name__
    plain = get_origin(annotation) or annotation
    return plain.__name__ if plain in (bool, int, float, str, list) else "any"


def deepspeed_keys() -> dict[str, Any]:
    """Return every key of a DeepSpeed JSON, sorted."""
    sections = {name: Recorder({}) for name in RECORDED}
    top = Recorder({"train_micro_batch_size_per_gpu": 1, **sections})
    runtime.DeepSpeedConfig(top)
    keys: dict[str, Any] = {name: kind for name, kind in top.asked.items() if name not in runtime_removed()}
    keys |= {name: model_keys(model) for name, model in MODELS.items()}
    keys |= {name: section.asked for name, section in sections.items()}
    keys["timers"] = {"throughput": model_keys(DeepSpeedThroughputTimerConfig)}
    keys["optimizer"] = {"type": "str", "params": "any", "legacy_fusion": "bool"}
    keys["scheduler"] = {"type": "str", "params": "any"}
    return keys


def runtime_removed() -> set[str]:
    """Return the keys that DeepSpeed looks for only to refuse them."""
    return set(runtime._REMOVED_TOP_LEVEL_CONFIG_KEYS)


if __name__ == "__main__":
    print(json.dumps(deepspeed_keys(), indent=1, sort_keys=True))
