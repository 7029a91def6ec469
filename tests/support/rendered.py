"""The settings files that tests compare with `tests/golden/rendered/`; run this file to write those anew."""

from typing import Any

from places import GOLDEN

from enc.encoder.config.schema import RunConfig
from enc.encoder.engine.settings import engine_files
from enc.encoder.sizing.batch_split import split_batch

RENDERED = GOLDEN / "rendered"
RANKS = 4
BATCH = {"trainer.global_batch_size": 64, "trainer.per_device_train_batch_size": 8, "trainer.gradient_clipping": 1.0}


def _deepspeed(stage: int, precision: str, offload: str = "none", **more: Any) -> dict[str, Any]:
    return {"parallel.engine": "deepspeed", "parallel.zero_stage": stage, "parallel.offload": offload,
            "trainer.mixed_precision": precision, **more}  # fmt: skip


def _fsdp(**more: Any) -> dict[str, Any]:
    return {"parallel.engine": "fsdp", **{f"parallel.{key}": value for key, value in more.items()}}


OWN_JSON = {
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 2e8, "round_robin_gradients": True},
    "dump_state": True,
}
CASES = {
    **{f"zero{stage}-{precision}": _deepspeed(stage, precision) for stage in range(4) for precision in ("bf16", "no")},
    **{f"zero{stage}-offload-optimizer": _deepspeed(stage, "bf16", "optimizer") for stage in (1, 2, 3)},
    "zero3-offload-parameters": _deepspeed(3, "bf16", "parameters"),
    "zero2-bf16-reduced-unclipped": _deepspeed(
        2, "bf16", **{"parallel.reduce_dtype": "bf16", "trainer.gradient_clipping": None}
    ),
    "zero2-own-json": _deepspeed(2, "bf16", **{"parallel.deepspeed_config": OWN_JSON}),
    "fsdp-full": _fsdp(),
    "fsdp-fp32": {**_fsdp(), "trainer.mixed_precision": "no"},
    "fsdp-hybrid": _fsdp(replicate=2, reshard_after_forward=False, reduce_dtype="bf16"),
    "fsdp-offload": _fsdp(offload="parameters"),
}


def rendered(case: str) -> str:
    """Return the settings file of a case as text."""
    config = RunConfig().changed(BATCH | CASES[case])
    (text,) = engine_files(config, split_batch(config.trainer, RANKS)).values()
    return text


if __name__ == "__main__":
    for name in CASES:
        (RENDERED / f"{name}.json").write_text(rendered(name))
