"""What `parallel.engine: auto` stands for. No torch."""

from enc.encoder.config.schema import RunConfig
from enc.encoder.engine.config import ParallelConfig
from enc.encoder.sizing.batch_split import split_batch
from enc.encoder.sizing.memory import needed_bytes

# Settings that only one engine has, or is taken for: (key of the parallel section, value) -> engine; the first counts.
_ASKS: dict[tuple[str, object], str] = {
    ("offload", "optimizer"): "deepspeed",
    **{("zero_stage", stage): "deepspeed" for stage in range(4) if stage != ParallelConfig().zero_stage},
    ("offload", "parameters"): "fsdp",
    ("reduce_dtype", "bf16"): "fsdp",
}
USABLE = 0.9  # of a device's memory; the rest is for CUDA itself and for gaps between tensors


def choose_engine(config: RunConfig, world_size: int, device_bytes: int | None) -> tuple[str, str]:
    """Return the engine of a run and the reason in one clause; an engine that the config names stays.

    DDP when a whole copy of the model and its state fits on a device, else FSDP, which needs nothing compiled.
    """
    parallel = config.parallel
    if parallel.engine != "auto":
        return parallel.engine, "as the config says" + _warning(config, parallel.engine, world_size, device_bytes)
    for (key, value), engine in _ASKS.items():
        if getattr(parallel, key) == value:
            return engine, f"parallel.{key} {value} needs it"
    if parallel.replicate > 1:
        return "fsdp", f"parallel.replicate {parallel.replicate} needs it"
    if world_size == 1:
        return "ddp", "one process" + _warning(config, "ddp", 1, device_bytes)
    if device_bytes is None:
        return "ddp", "the memory of a device is not known"
    if fits(config, "ddp", world_size, device_bytes):
        return "ddp", f"a whole copy fits: {_of(config, 'ddp', world_size, device_bytes)}"
    why = f"a whole copy needs {_of(config, 'ddp', world_size, device_bytes)}"
    return "fsdp", why + _warning(config, "fsdp", world_size, device_bytes)


def fits(config: RunConfig, engine: str, world_size: int, device_bytes: int) -> bool:
    """Tell whether a step fits into the usable part of a device."""
    return _needed(config, engine, world_size) <= USABLE * device_bytes


def _needed(config: RunConfig, engine: str, world_size: int) -> int:
    rows = split_batch(config.trainer, world_size).rows_per_microbatch
    return needed_bytes(config.changed({"parallel.engine": engine}), world_size, rows)


def _of(config: RunConfig, engine: str, world_size: int, device_bytes: int) -> str:
    return f"about {_needed(config, engine, world_size) / 1e9:.1f} of {device_bytes / 1e9:.1f} GB"


def _warning(config: RunConfig, engine: str, world_size: int, device_bytes: int | None) -> str:
    """Return what to do where not even this engine fits, or an empty text."""
    if device_bytes is None or fits(config, engine, world_size, device_bytes):
        return ""
    steps = ["a smaller trainer.per_device_train_batch_size"]
    if not config.trainer.gradient_checkpointing:
        steps.insert(0, "trainer.gradient_checkpointing true")
    if config.parallel.offload == "none":
        steps.append("parallel.offload parameters" if engine == "fsdp" else "parallel.offload optimizer")
    return f"; it may not fit ({_of(config, engine, world_size, device_bytes)}): try {' or '.join(steps)}"
