"""What a sharding engine is told, as the JSON that lies in the run folder: `ds_config.json` or `fsdp.json`. No torch.

base in ds_configs/ -> values of the run config -> the user's own DeepSpeed JSON -> the file -> the ranks read it
"""

import json
from pathlib import Path
from typing import Any

from enc.encoder.config.schema import RunConfig, flatten
from enc.encoder.engine.config import ParallelConfig
from enc.encoder.engine.user_json import merged, read_user_json, user_settings
from enc.encoder.errors import UsageError
from enc.encoder.files import read_json
from enc.encoder.sizing.batch_split import BatchSplit

BASES = Path(__file__).parents[2] / "ds_configs"
DEEPSPEED_FILE, FSDP_FILE = "ds_config.json", "fsdp.json"
_USED = {  # what the engines here read by themselves
    "deepspeed": ("zero_optimization.stage", "gradient_clipping"),
    "fsdp": ("reshard_after_forward", "param_dtype", "reduce_dtype", "cpu_offload"),
}
_ANEW = "`enc launch` and `enc resume` write it anew."


def to_json(settings: dict[str, Any]) -> str:
    """Return settings as the text of a file; the order of keys is that of the base."""
    return json.dumps(settings, indent=2) + "\n"


def engine_files(config: RunConfig, split: BatchSplit) -> dict[str, str]:
    """Return what the engine of a config reads beside `config.yaml`: {file name: text}. Raises UsageError."""
    match config.parallel.engine:
        case "deepspeed":
            return {DEEPSPEED_FILE: to_json(deepspeed_settings(config, split))}
        case "fsdp":
            return {FSDP_FILE: to_json(fsdp_settings(config, split))}
    return {}


def read_settings(run_dir: Path, config: RunConfig, split: BatchSplit) -> dict[str, Any]:
    """Return what the file of a run folder tells the engine of a config: the ranks build it with this.

    Raises UsageError when the file is missing, is no JSON object, or does not go with the ranks and batch of the run.
    """
    path = run_dir / (DEEPSPEED_FILE if config.parallel.engine == "deepspeed" else FSDP_FILE)
    settings = _read_object(path)
    found, wanted = flatten(settings), _fixed_by_the_run(config, split)
    lacking = {*wanted, *_USED[config.parallel.engine]} - found.keys()
    if lacking:
        raise UsageError(f"{path} lacks {', '.join(sorted(lacking))}. Add it; {_ANEW}")
    for key, value in wanted.items():
        if found[key] != value:
            raise UsageError(f"{path}: {key} is {json.dumps(found[key])}, but this run has {value}. Mend it; {_ANEW}")
    return settings


def _read_object(path: Path) -> dict[str, Any]:
    try:
        settings = read_json(path)
    except OSError as error:
        raise UsageError(
            f"{path}, which tells the engine how to shard, cannot be read: {error.strerror}; {_ANEW}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not valid JSON: {error}. Mend it; {_ANEW}") from None
    if not isinstance(settings, dict):
        raise UsageError(f"{path}: the settings of an engine are an object, {{...}}; this is not one. Mend it; {_ANEW}")
    return settings


def _fixed_by_the_run(config: RunConfig, split: BatchSplit) -> dict[str, int]:
    """Return the settings that the ranks and the loop rely on, by dotted key."""
    if config.parallel.engine == "fsdp":
        return {f"mesh.{name}": count for name, count in fsdp_settings(config, split)["mesh"].items()}
    return _batch_settings(split)


def _batch_settings(split: BatchSplit) -> dict[str, int]:
    return {
        "train_batch_size": split.rows_per_step,
        "train_micro_batch_size_per_gpu": split.rows_per_microbatch,
        "gradient_accumulation_steps": split.accumulation,
    }


def _base(name: str) -> dict[str, Any]:
    settings: dict[str, Any] = read_json(BASES / f"{name}.json")
    return settings


def check_replicas(parallel: ParallelConfig, world_size: int) -> None:
    """Raise UsageError when `parallel.replicate` does not divide the number of ranks."""
    replicas = parallel.replicate
    if world_size % replicas:
        raise UsageError(
            f"parallel.replicate is {replicas}, which does not divide the {world_size} ranks; use a divisor of "
            f"{world_size}."
        )


def fsdp_settings(config: RunConfig, split: BatchSplit) -> dict[str, Any]:
    """Return the contents of `fsdp.json`: the mesh, dtypes, and what is kept or offloaded.

    Raises UsageError when `parallel.replicate` does not divide the number of ranks.
    """
    parallel, world = config.parallel, split.world_size
    check_replicas(parallel, world)
    return _base("fsdp") | {
        "mesh": {"replicate": parallel.replicate, "shard": world // parallel.replicate},
        "reshard_after_forward": parallel.reshard_after_forward,
        "param_dtype": "bf16" if config.trainer.bf16 else "fp32",
        "reduce_dtype": parallel.reduce_dtype,
        "cpu_offload": parallel.offload == "parameters",
    }


def deepspeed_settings(config: RunConfig, split: BatchSplit) -> dict[str, Any]:
    """Return the contents of `ds_config.json`, exactly what `deepspeed.initialize` gets.

    Raises UsageError that lists every problem of the user's own JSON (`parallel.deepspeed_config`).
    """
    ours = _our_settings(config, split)
    return merged(ours, own_settings(config, split))


def own_settings(config: RunConfig, split: BatchSplit) -> dict[str, Any]:
    """Return what the user's own JSON adds to ours; it is the same for any number of ranks. Raises UsageError."""
    own = config.parallel.deepspeed_config
    return {} if own is None else user_settings(read_user_json(own), _our_settings(config, split), config)


def _our_settings(config: RunConfig, split: BatchSplit) -> dict[str, Any]:
    settings = _base(_base_name(config))
    settings |= {
        **_batch_settings(split),
        "gradient_clipping": config.trainer.gradient_clipping or 0.0,
        "communication_data_type": config.parallel.reduce_dtype,
    }
    if "bf16" in settings:
        if config.trainer.bf16:
            settings["bf16"] = {"enabled": True}
        else:
            del settings["bf16"], settings["data_types"]
    settings["zero_optimization"] = _zero_section(settings["zero_optimization"], config)
    return settings


def _base_name(config: RunConfig) -> str:
    stage = config.parallel.zero_stage
    return f"zero{stage}_offload" if stage == 3 and config.parallel.offload != "none" else f"zero{stage}"


def _zero_section(base: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    bucket, offload = config.parallel.bucket_size, config.parallel.offload
    section = dict(base)
    for key in base:
        if key.endswith("bucket_size"):
            section[key] = bucket + bucket % 2  # ZeRO 1 and 2 assert that it is even
    if offload == "optimizer":
        section["offload_optimizer"] = _base("zero3_offload")["zero_optimization"]["offload_optimizer"]
        section.pop("offload_param", None)
    return section


def engine_name(config: RunConfig) -> str:
    """Return the engine with what tells it from its variants, e.g. `deepspeed, ZeRO 2`."""
    parallel = config.parallel
    words: list[str] = [parallel.engine]
    if parallel.engine == "deepspeed":
        words.append(f"ZeRO {parallel.zero_stage}")
    if parallel.replicate > 1:
        words.append(f"{parallel.replicate} replicas")
    if parallel.offload != "none":
        words.append(f"{parallel.offload} on the CPU")
    return ", ".join(words)
