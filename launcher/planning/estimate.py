"""What a run would need on other machines: every engine side by side, for `enc plan`. No torch, no data."""

from dataclasses import dataclass
from typing import Any

from enc.encoder.config.schema import RunConfig
from enc.encoder.gpus import Gpu
from enc.encoder.sizing import memory
from enc.encoder.sizing.batch_split import split_batch
from enc.encoder.sizing.sizes import checkpoint_bytes, num_parameters, states_per_token, training_flops
from enc.launcher.planning.engine_choice import USABLE


@dataclass(frozen=True)
class Cluster:
    """The machines of a run that is only thought of."""

    nodes: int
    nproc: int
    gpu: Gpu

    @property
    def ranks(self) -> int:
        return self.nodes * self.nproc

    @property
    def usable(self) -> float:
        return USABLE * self.gpu.bytes


@dataclass(frozen=True)
class Variant:
    """One way of spreading a run, with what it needs; bytes are of one GPU, host bytes of one machine."""

    name: str
    settings: dict[str, Any]  # dotted key of the run config -> value
    static: int
    step: int
    host: int
    fits: bool
    largest_rows: int

    def as_dict(self) -> dict[str, Any]:
        """Return it with units in the names."""
        return {
            "name": self.name, "settings": self.settings, "fits": self.fits,
            "static_bytes_per_gpu": self.static, "step_bytes_per_gpu": self.step, "host_bytes_per_node": self.host,
            "largest_rows_per_microbatch": self.largest_rows,
        }  # fmt: skip


def variants(config: RunConfig, cluster: Cluster) -> list[Variant]:
    """Return every way of spreading a run over a cluster, the one with the least traffic first."""
    rows = split_batch(config.trainer, cluster.ranks).rows_per_microbatch
    return [_variant(name, settings, config, cluster, rows) for name, settings in _spreads(cluster)]


def _spreads(cluster: Cluster) -> list[tuple[str, dict[str, Any]]]:
    ddp = [("ddp", _parallel("ddp"))]
    if cluster.nodes > 1 and cluster.nproc > 1:
        ddp.append(("fsdp in a node", _parallel("fsdp", replicate=cluster.nodes)))
    if cluster.ranks > 1:
        ddp.append(("fsdp", _parallel("fsdp")))
        ddp += [(f"zero {stage}", _parallel("deepspeed", zero_stage=stage)) for stage in (1, 2, 3)]
    return [
        *ddp,
        *((f"zero {stage}, offload optimizer", _parallel("deepspeed", zero_stage=stage, offload="optimizer"))
          for stage in (2, 3)),
        ("fsdp, offload all", _parallel("fsdp", offload="parameters")),
        ("zero 3, offload all", _parallel("deepspeed", zero_stage=3, offload="parameters")),
    ]  # fmt: skip


def _parallel(engine: str, zero_stage: int = 2, offload: str = "none", replicate: int = 1) -> dict[str, Any]:
    used = {"engine": engine, "zero_stage": zero_stage, "offload": offload, "replicate": replicate}
    return {f"parallel.{key}": value for key, value in used.items()}


def _variant(name: str, settings: dict[str, Any], config: RunConfig, cluster: Cluster, rows: int) -> Variant:
    changed = config.changed(settings)
    static, step = memory.static_bytes(changed, cluster.ranks), memory.step_bytes(changed, cluster.ranks, rows)
    return Variant(
        name=name,
        settings=settings,
        static=static.device,
        step=step.device,
        host=static.host * cluster.nproc,
        fits=static.device + step.device <= cluster.usable,
        largest_rows=memory.largest_rows(changed, cluster.ranks, cluster.usable),
    )


def estimate(config: RunConfig, cluster: Cluster, mfu: float) -> dict[str, Any]:
    """Return steps, tokens, operations and hours of a run, with units in the names.

    Attention is counted as if each row were one document: an upper bound for packed rows.
    """
    split, row = split_batch(config.trainer, cluster.ranks), config.row_length
    tokens = split.rows_per_step * row
    labels = round(tokens * config.datacollator.mlm_probability)
    states, keys = (round(tokens * share) for share in states_per_token(config))
    flops = training_flops(
        config.model, states, keys, states * keys // split.rows_per_step, labels,
        not config.trainer.last_layer_of_labels_only,
    )  # fmt: skip
    rate = cluster.ranks * cluster.gpu.peak_flops(config.trainer.bf16) * mfu
    steps = config.trainer.max_steps
    return {
        "parameters": num_parameters(config),
        "global_batch_size": split.rows_per_step,
        "gradient_accumulation_steps": split.accumulation,
        "rows_per_microbatch": split.rows_per_microbatch,
        "row_length": row,
        "tokens_per_step": tokens,
        "max_steps": steps,
        "total_tokens": tokens * steps,
        "flops_per_step": flops,
        "step_s": flops / rate,
        "hours": flops * steps / rate / 3600,
        "gpu_hours": flops * steps / rate / 3600 * cluster.ranks,
        "checkpoint_bytes": checkpoint_bytes(config),
    }


def recommendation(config: RunConfig, cluster: Cluster, found: list[Variant]) -> str:
    """Return one sentence: what to use, and how, or what to change where nothing fits."""
    wanted = config.trainer.per_device_train_batch_size
    first = next((variant for variant in found if variant.fits), None)
    if first:
        more = f"; microbatches of up to {first.largest_rows} rows fit" if first.largest_rows > wanted else ""
        return f"Use {_words(first)}: it fits with the least traffic between GPUs{more}."
    advice = "" if config.trainer.gradient_checkpointing else "trainer.gradient_checkpointing=true"
    smaller = next((variant for variant in found if variant.largest_rows), None)
    if smaller:
        rows = f"trainer.per_device_train_batch_size={smaller.largest_rows}"
        return f"Nothing fits as it is: use {_words(smaller)} with {' or '.join(filter(None, [rows, advice]))}."
    return f"Nothing fits: {f'try {advice}, ' if advice else 'use '}more GPUs, or GPUs with more memory."


def _words(variant: Variant) -> str:
    defaults = _parallel("")
    return " ".join(f"{key}={value}" for key, value in variant.settings.items() if value != defaults[key])
