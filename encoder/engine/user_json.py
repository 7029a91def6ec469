"""The user's own DeepSpeed JSON: read it, find every problem of it, and return what it adds to a run's settings.

read (syntax, lines, duplicate keys) -> known keys and kinds -> contradictions with the run config -> what it adds

Values that say what the run config says too, and `"auto"`, add nothing. Anything else that the config decides is a
contradiction: the config wins nowhere silently. DeepSpeed's keys are in `ds_configs/keys.json` (see tests).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from enc.encoder.config.messages import raise_problems
from enc.encoder.config.schema import RunConfig, flatten
from enc.encoder.config.yaml_source import Problem, Source, read_yaml
from enc.encoder.errors import UsageError
from enc.encoder.files import read_json
from enc.encoder.spelling import did_you_mean

KEYS = Path(__file__).parents[2] / "ds_configs" / "keys.json"
Settings = dict[str, Any]

# Parts of DeepSpeed, present and past, that have no place in a run of enc, with the reason or with what has.
_UNUSED = {
    "activation_checkpointing": "use trainer.gradient_checkpointing",
    "amp": "trainer.mixed_precision decides",
    "autotuning": "`enc plan` shows what fits",
    "checkpoint": "enc writes its own checkpoints",
    "comet": "enc logs by itself, and what is here would be copied into every checkpoint",
    "compile": "use trainer.torch_compile",
    "compression_training": "enc trains unquantized weights",
    "csv_monitor": "enc logs by itself, to metrics.jsonl",
    "curriculum_learning": "enc loads its own batches",
    "data_efficiency": "enc loads its own batches",
    "data_parallel_size": "enc spreads data only, over all ranks",
    "dataloader_drop_last": "enc loads its own batches",
    "datastates_ckpt": "enc writes its own checkpoints",
    "eigenvalue": "enc trains unquantized weights",
    "elasticity": "a run of enc can be resumed on another number of ranks",
    "expert_parallel": "enc spreads data only",
    "graph_harvesting": "use trainer.torch_compile",
    "hybrid_engine": "enc does not generate text",
    "nebula": "enc writes its own checkpoints",
    "pipeline": "enc spreads data only",
    "progressive_layer_drop": "enc trains every layer at every step",
    "quantize_training": "enc trains unquantized weights",
    "seq_parallel_communication_data_type": "enc spreads data only",
    "sequence_parallel_size": "enc spreads data only",
    "sparse_attention": "model.attn_backend decides",
    "sparse_gradients": "the gradients of enc's embeddings are dense",
    "tensor_parallel": "enc spreads data only",
    "tensorboard": "enc logs by itself, to TensorBoard too",
    "torch_autocast": "trainer.mixed_precision decides",
    "use_data_before_expert_parallelism": "enc spreads data only",
    "wandb": "enc logs by itself: use wandb.enabled of the run config",
    "weight_quantization": "enc trains unquantized weights",
    "zero_optimization.cpu_offload": "it is an old key: use parallel.offload",
    "zero_optimization.cpu_offload_param": "it is an old key: use parallel.offload",
    "zero_optimization.cpu_offload_use_pin_memory": "it is an old key: use parallel.offload",
    "zero_optimization.grad_hooks": "DeepSpeed has dropped it",
    "zero_optimization.mics_hierarchical_params_gather": "use parallel.engine fsdp with parallel.replicate",
    "zero_optimization.mics_shard_size": "use parallel.engine fsdp with parallel.replicate",
    "zero_optimization.zenflow": "checkpoints need the moments as they are",
    "zero_optimization.zero_quantized_gradients": "gradients are summed in parallel.reduce_dtype",
    "zero_optimization.zero_quantized_nontrainable_weights": "checkpoints need the weights as they are",
    "zero_optimization.zero_quantized_weights": "checkpoints need the weights as they are",
    "zero_optimization.zeropp_loco_param": "gradients are summed in parallel.reduce_dtype",
}
# Values on which the engine relies.
_NEEDED = {
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "gradient_allreduce_op": "mean",
    "gradient_predivide_factor": 1.0,
    "prescale_gradients": False,
    "managed_gradient_accumulation": True,
    "data_types.grad_accum_dtype": "fp32",
    "data_types.param_dtype": None,
    "data_types.buffer_dtype": None,
    "data_types.keep_in_fp32_modules": "auto",
    "bf16.check_grad_overflow": True,  # a step whose gradients are not finite is skipped
    "bf16.bf16_master_weights_and_grads": False,
    "bf16.bf16_optimizer_states": False,
    "aio.use_gds": False,
    "zero_optimization.compute_grad_norm": True,
    "zero_optimization.legacy_stage1": False,
    "zero_optimization.zero_hpz_partition_size": 1,  # a second copy of the weights, which `load` does not write
    "zero_optimization.offload_optimizer.ratio": 1.0,
    "zero_optimization.offload_optimizer.super_offload": False,
}
# Lowest whole numbers with which DeepSpeed neither fails at the start nor divides by zero; in zero_optimization it is 0
# for all others.
_LOWEST = {
    "steps_per_print": 1,
    "vocabulary_size": 1,
    "zero_optimization.allgather_bucket_size": 1,
    "zero_optimization.reduce_bucket_size": 1,
}
_LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
_SAME = {
    "train_batch_size": "trainer.global_batch_size",
    "train_micro_batch_size_per_gpu": "trainer.per_device_train_batch_size",
    "gradient_accumulation_steps": "trainer.gradient_accumulation_steps",
    "gradient_clipping": "trainer.gradient_clipping",
    "communication_data_type": "parallel.reduce_dtype",
    "zero_optimization.stage": "parallel.zero_stage",
}
_KINDS = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text", "list": "a list"}


def read_user_json(given: str | Settings) -> Source:
    """Read `parallel.deepspeed_config`, a path or the contents. Raises UsageError when it is no JSON object."""
    if isinstance(given, dict):
        return Source("parallel.deepspeed_config", given, {"": "parallel.deepspeed_config"})
    try:
        text = Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UsageError(f"parallel.deepspeed_config {given} cannot be read: {reason}; name a JSON file.") from None
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{given}: this is not valid JSON: {error}; mend it or leave the file out.") from None
    if not isinstance(tree, dict):
        raise UsageError(f"{given}: DeepSpeed's settings are an object, {{...}}; this is not one.")
    source = read_yaml(text.replace("\t", " "), given)  # JSON is YAML, and YAML keeps lines and duplicate keys
    source.tree = tree
    return source


def user_settings(source: Source, ours: Settings, config: RunConfig) -> Settings:
    """Return what the user's JSON adds to our settings. Raises UsageError that lists every problem of it."""
    known = read_json(KEYS)
    problems = [Problem(key, text, source.place(key)) for key, text in _problems(source.tree, known, ours, config)]
    raise_problems(source.name, [*source.problems, *problems])
    decided = _decided(ours)
    added: Settings = {}
    for given, value in flatten(source.tree).items():
        key = _present_name(given)
        section = key.partition(".")[0]
        if value in ("auto", {}) or key in decided or section in ("fp16", "optimizer", "scheduler") or _unused(key):
            continue
        if _offload_section(key) and _offload_section(key) not in ours["zero_optimization"]:
            continue
        whole = isinstance(value, float) and value.is_integer() and flatten(known).get(key) == "int"
        _set(added, key, int(value) if whole else value)
    return added


def merged(ours: Settings, added: Settings) -> Settings:
    """Return our settings with the user's laid over them, section by section."""
    result = dict(ours)
    for key, value in added.items():
        below = ours.get(key)
        result[key] = merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result


def _set(tree: Settings, key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[last] = value


def _offload_section(key: str) -> str:
    parts = key.split(".")
    return parts[1] if len(parts) > 2 and parts[1] in ("offload_optimizer", "offload_param") else ""


def _present_name(key: str) -> str:
    """Return a dotted key with `bf16` for its old name; DeepSpeed reads only one of the two sections."""
    return key.replace("bfloat16.", "bf16.", 1) if key.startswith("bfloat16.") else key


def _unused(key: str) -> str:
    """Return the section or key of `_UNUSED` that a dotted key lies in, or an empty text."""
    return next((name for name in _UNUSED if f"{key}.".startswith(f"{name}.")), "")


# --- problems --------------------------------------------------------------------------------------------------------


def _problems(tree: Settings, known: Settings, ours: Settings, config: RunConfig) -> Iterator[tuple[str, str]]:
    bad = []
    for key, text in _shape_problems(tree, known, ""):
        bad.append(key)
        yield key, text
    good = {key: value for key, value in flatten(tree).items() if not any(f"{key}.".startswith(f"{b}.") for b in bad)}
    yield from _unused_problems(tree)
    yield from _optimizer_problems(tree.get("optimizer"), config)
    yield from _scheduler_problems(tree.get("scheduler"))
    for key, value in good.items():
        if value == "auto" or _unused(key):
            continue
        if text := _contradiction(key, value, ours, config) or _limit_problem(key, value, known, ours):
            yield key, text


def _shape_problems(tree: Settings, known: Settings, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield unknown keys, and values that are of another kind than DeepSpeed's."""
    for name, value in tree.items():
        key, kind = f"{prefix}{name}", known.get(name)
        if key in _UNUSED:
            continue
        if kind is None:
            yield key, f"is not a key of DeepSpeed{_nearest(name, known, prefix)}"
        elif isinstance(kind, dict) and isinstance(value, dict):
            yield from _shape_problems(value, kind, f"{key}.")
        elif isinstance(kind, dict):
            yield key, f"is {_shown(value)}, must be an object, {{...}}"
        elif not _fits(value, kind):
            yield key, f"is {_shown(value)}, must be {_KINDS[kind]}"


def _nearest(name: str, known: Settings, prefix: str) -> str:
    if hint := did_you_mean(name, list(known)):
        return hint
    everywhere = list(flatten(read_json(KEYS)))
    elsewhere = next((key for key in everywhere if key.rpartition(".")[2] == name), None)
    return f"; did you mean {elsewhere}?" if elsewhere else did_you_mean(f"{prefix}{name}", everywhere)


def _fits(value: Any, kind: str) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    match kind:
        case _ if value == "auto":
            return True
        case "bool":
            return isinstance(value, bool)
        case "int":
            return number and (isinstance(value, int) or value.is_integer())  # 5e8 is common
        case "float":
            return number
        case "str":
            return isinstance(value, str)
        case "list":
            return isinstance(value, list)
    return True


def _limit_problem(key: str, value: Any, known: Settings, ours: Settings) -> str:
    """Return what is wrong with a value of the right kind that DeepSpeed would only refuse in the ranks, or nothing."""
    in_zero = key.startswith("zero_optimization.") and flatten(known).get(key) == "int"
    lowest = _LOWEST.get(key, 0 if in_zero else None)
    if lowest is not None and value is not None and not (_fits(value, "int") and value >= lowest):
        return f"is {_shown(value)}, must be a whole number of at least {lowest}"
    if key == "zero_optimization.allgather_bucket_size" and ours["zero_optimization"]["stage"] in (1, 2) and value % 2:
        return f"is {_shown(value)}, must be even with ZeRO 1 and 2"
    if key == "zero_optimization.offload_optimizer.cpuadam_cores_perc" and not 0 <= value <= 1:
        return f"is {_shown(value)}, must be from 0 to 1"
    if key == "log_level" and value is not None and str(value).lower() not in _LOG_LEVELS:
        return f"is {_shown(value)}, must be one of {', '.join(_LOG_LEVELS)}"
    return ""


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)  # contents in a YAML config may hold a date


def _unused_problems(tree: Settings) -> Iterator[tuple[str, str]]:
    for key, instead in _UNUSED.items():
        section, _, name = key.rpartition(".")
        place = tree.get(section, {}) if section else tree
        value = place.get(name) if isinstance(place, dict) else None
        off = value in (None, False, "auto", {}) or (isinstance(value, dict) and value.get("enabled") is False)
        if not off or (key == "comet" and isinstance(value, dict) and "api_key" in value):
            yield key, f"has no place in a run of enc ({instead}); remove it"


def _optimizer_problems(section: Any, config: RunConfig) -> Iterator[tuple[str, str]]:
    if not isinstance(section, dict):
        return
    ours = config.optimizer
    kind = section.get("type", "auto")
    if kind != "auto" and str(kind).lower() not in ({"adamw", "adam"} if ours.name == "adamw" else {"adam"}):
        yield "optimizer.type", f"is {_shown(kind)}, but optimizer.name is {ours.name}; remove the section"
    params = section.get("params", {})
    if not isinstance(params, dict):
        yield from (
            [] if params == "auto" else [("optimizer.params", f"is {_shown(params)}, must be an object, {{...}}")]
        )
        return
    adam = {"lr": ours.lr, "betas": list(ours.betas), "eps": ours.eps, "weight_decay": ours.weight_decay}
    fixed = {"adam_w_mode": ours.name == "adamw", "bias_correction": True}
    for name, value in params.items():
        key = f"optimizer.params.{name}"
        if value == "auto" or name == "torch_adam":  # the optimizer is torch's in any case
            continue
        if name in adam and value != adam[name]:
            advice = _set_to(f"optimizer.{name}", value)
            yield key, f"is {_shown(value)}, but optimizer.{name} is {_shown(adam[name])}; {advice}"
        elif name in fixed and value != fixed[name]:
            yield key, f"is {_shown(value)}, but optimizer.name is {ours.name}; remove it here"
        elif name not in adam | fixed:
            yield key, "is nothing that the optimizer of the run has; remove it"


def _scheduler_problems(section: Any) -> Iterator[tuple[str, str]]:
    params = section.get("params", {}) if isinstance(section, dict) else {}
    given = [name for name, value in params.items() if value != "auto"] if isinstance(params, dict) else []
    if given:
        yield "scheduler", f"sets {', '.join(given)}, but scheduler.* of the run config decides; remove the section"


def _decided(ours: Settings) -> Settings:
    """Return the values that the run config decides, by dotted key."""
    flat = flatten(ours)
    zero = ours["zero_optimization"]
    return {
        **{key: flat[key] for key in _SAME},
        **_NEEDED,
        "bf16.enabled": "bf16" in ours,
        "fp16.enabled": False,
        **{f"zero_optimization.{name}.device": zero[name]["device"] if name in zero else "none"
           for name in ("offload_optimizer", "offload_param")},
    }  # fmt: skip


def _contradiction(key: str, value: Any, ours: Settings, config: RunConfig) -> str:
    """Return what is wrong with a value that the run config decides, or an empty text."""
    decided = _decided(ours)
    key = _present_name(key)
    if key not in decided or value == decided[key]:
        return ""
    both = f"is {_shown(value)}, but the run has {_shown(decided[key])}"
    if key in _NEEDED:
        return f"is {_shown(value)}, but enc needs {_shown(decided[key])}; remove it here"
    if key == "fp16.enabled":
        return "is true, but enc has no fp16; set it to false and use trainer.mixed_precision bf16"
    if key == "bf16.enabled":
        if value and config.trainer.bf16:
            return f"{both}: ZeRO 0 keeps fp32 weights under autocast; set parallel.zero_stage 1 or more, or false here"
        return f"{both}; {_set_to('trainer.mixed_precision', 'bf16' if value else 'no')}"
    if key.endswith(".device"):
        return f"{both}; {_offload_advice(key, value)}"
    return f"{both}; {_set_to(_SAME[key], None if key == 'gradient_clipping' and not value else value)}"


def _offload_advice(key: str, device: Any) -> str:
    if device not in ("cpu", "none"):
        return "enc offloads to the CPU only: write cpu or none"
    if key.endswith("offload_param.device"):
        return _set_to("parallel.offload", "parameters" if device == "cpu" else "optimizer")
    return _set_to("parallel.offload", "optimizer" if device == "cpu" else "none")


def _set_to(key: str, value: Any) -> str:
    """Return the advice to give a key of the run config this value, where the key can have it."""
    section, _, name = key.partition(".")
    shown = value if isinstance(value, str) else _shown(value)
    try:
        type(getattr(RunConfig(), section)).model_validate({name: value})
    except ValidationError:
        return f"{key} cannot be {shown}, so remove it here"
    return f"set {key} {shown}, or remove it here"
