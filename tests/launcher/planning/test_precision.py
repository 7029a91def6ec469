"""What `trainer.mixed_precision: auto` becomes, and that a run keeps it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import yaml
from running import Enc

from enc.encoder.config.load import load_config
from enc.launcher.machine.cpus import has_bf16
from enc.launcher.machine.facts import MachineFacts, look
from enc.launcher.machine.gpus import InstalledGpu
from enc.launcher.planning.precision import choose_precision

HERE = replace(look(), num_gpus=0, cpu_has_bf16=True)
NARROW, WIDE = {"model.hidden_size": 256}, {"model.hidden_size": 384, "model.num_attention_heads": 6}
NODES = {"launch.scheduler": "slurm", "launch.nodes": 2}


def with_gpus(*capabilities: str) -> MachineFacts:
    gpus = [InstalledGpu("0", f"GPU {capability}", "1", 80000, 0, capability) for capability in capabilities]
    return replace(HERE, num_gpus=len(gpus), list_gpus=lambda: gpus)


@pytest.mark.parametrize(
    ("keys", "facts", "precision", "why"),
    [
        (NARROW, HERE, "no", "slower on some CPUs for a model less than 384 wide"),
        (WIDE, HERE, "bf16", "this CPU has instructions for it"),
        (WIDE, replace(HERE, cpu_has_bf16=False), "no", "no instructions for bf16"),
        (NARROW, with_gpus("9.0"), "bf16", "the GPUs have it"),
        (NARROW, with_gpus("9.0", "7.5"), "no", "GPU 7.5 has no bf16"),
        (NARROW | NODES, HERE, "bf16", "since Ampere"),
        (WIDE | NODES | {"trainer.use_cpu": True}, HERE, "no", "CPUs of the nodes are not known"),
        (NARROW | {"trainer.mixed_precision": "bf16"}, HERE, "bf16", "as the config says"),
        (WIDE | {"trainer.mixed_precision": "no"}, with_gpus("9.0"), "no", "as the config says"),
    ],
)
def test_auto_is_what_is_fast_there(keys: dict[str, Any], facts: MachineFacts, precision: str, why: str) -> None:
    found, reason = choose_precision(load_config("quickstart", keys).config, facts)
    assert found == precision
    assert why in reason


@pytest.mark.parametrize(
    ("cap", "has"),
    [(None, True), ("all", True), ("AVX2", False), ("AVX512_CORE", False)],
)
def test_a_cap_on_the_instructions_counts(cap: str | None, has: bool) -> None:
    environment = {} if cap is None else {"ONEDNN_MAX_CPU_ISA": cap}
    assert has_bf16("flags : avx2 avx512f avx512_bf16 amx_bf16", environment) is has
    assert not has_bf16("flags : avx2 avx512f", environment)


def test_a_resumed_run_keeps_what_it_began_with(enc: Enc, smoke: Callable[..., list[str]]) -> None:
    """`config.yaml` says what `auto` became; a config that still says `auto` goes on with that, on any machine."""
    words = smoke("run", "trainer.max_steps=2", "trainer.save_steps=1", "dataset.num_workers=0")
    first = enc(*words, "trainer.mixed_precision=bf16")
    assert "Precision: bf16, as the config says." in first.stderr
    more = ("trainer.mixed_precision=auto", "trainer.resume_from_checkpoint=1")
    again = enc(*words, *more)
    assert "trainer.mixed_precision" not in again.stderr
    assert yaml.safe_load((enc.folder / "run/config.yaml").read_text())["trainer"]["mixed_precision"] == "bf16"
    fresh = enc(*smoke("fresh", "trainer.mixed_precision=auto", "trainer.max_steps=1"))
    assert "Precision: fp32" in fresh.stderr
    assert yaml.safe_load((enc.folder / "fresh/config.yaml").read_text())["trainer"]["mixed_precision"] == "no"
