"""The memory of a rank, from the config alone. What engines hold is measured in `distributed/test_memory.py`."""

import pytest
import torch

from enc.encoder.config.load import load_config
from enc.encoder.config.schema import RunConfig
from enc.encoder.models.build import build_model
from enc.encoder.models.mpnet.config import MpnetConfig
from enc.encoder.models.neobert.config import NeoBertConfig
from enc.encoder.sizing import memory
from enc.encoder.sizing.sizes import num_parameters

CONFIG = load_config("neobert-250m").config


def changed(**parallel: object) -> RunConfig:
    return CONFIG.changed({f"parallel.{key}": value for key, value in parallel.items()})


def test_sharding_divides_what_is_held() -> None:
    """Bytes a parameter between steps: 16 with DDP, 12 over the ranks with FSDP, 2 + 12 over the ranks with ZeRO 2."""
    params, ranks = num_parameters(CONFIG), 8
    held = {
        "ddp": memory.static_bytes(changed(engine="ddp"), ranks).device,
        "fsdp": memory.static_bytes(changed(engine="fsdp"), ranks).device,
        "hybrid": memory.static_bytes(changed(engine="fsdp", replicate=2), ranks).device,
        "zero 2": memory.static_bytes(changed(engine="deepspeed"), ranks).device,
    }
    wanted = {"ddp": 16, "fsdp": 12 / 8, "hybrid": 12 / 4, "zero 2": 2 + 12 / 8}
    assert held == pytest.approx({name: size * params for name, size in wanted.items()}, rel=0.001)


def test_auto_has_no_memory() -> None:
    with pytest.raises(ValueError, match="resolve it with choose_engine first"):
        memory.static_bytes(changed(engine="auto"), 2)


def test_the_parts_are_the_whole() -> None:
    """What the plan lists adds up to what decides whether a run fits."""
    for engine in ("ddp", "fsdp", "deepspeed"):
        parts = memory.peak_parts(changed(engine=engine), 4, 8)
        assert sum(parts.values()) - parts["host"] == memory.peak_bytes(changed(engine=engine), 4, 8)


def test_the_largest_microbatch_is_the_largest() -> None:
    """One row more does not fit; 0 where not even one row does."""
    config = changed(engine="ddp")
    rows = memory.largest_rows(config, 8, 60e9)
    assert memory.peak_bytes(config, 8, rows) <= 60e9 < memory.peak_bytes(config, 8, rows + 1)
    assert memory.largest_rows(config, 8, 1e9) == 0


def test_recomputing_more_keeps_less() -> None:
    def activations(on: bool, **parallel: object) -> int:
        config = changed(engine="ddp", **parallel).changed({"trainer.gradient_checkpointing": on})
        return memory.step_bytes(config, 1, 8).activations

    full = activations(True)
    selective = activations(True, activation_checkpointing="selective")
    every_second = activations(True, activation_checkpointing_every=2)
    assert full < selective < activations(False)
    assert full < every_second < activations(False)


SIZES = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 1024}
MODELS = {
    "swiglu": NeoBertConfig(**SIZES),
    "gelu, LayerNorm": NeoBertConfig(**SIZES, hidden_act="gelu", rms_norm=False),
    "learned positions": NeoBertConfig(**SIZES, rope=False),
    "nGPT": NeoBertConfig(**SIZES, ngpt=True),
    "dropout": NeoBertConfig(**SIZES, dropout_prob=0.1),
    "MPNet": MpnetConfig(**SIZES),
    "MPNet, pre-norm": MpnetConfig(**SIZES, normalize_before=True),
}


@pytest.mark.parametrize("precision", ["bf16", "no"])
@pytest.mark.parametrize("kind", MODELS)
def test_activations_are_what_autograd_saves(kind: str, precision: str) -> None:
    """To 5 %, counting each storage once, weights and their bf16 copies left out."""
    words = {"trainer.mixed_precision": precision, "dataset.max_seq_length": 128, "objective": "mlm"}
    config = RunConfig(model=MODELS[kind]).changed(words)
    module = build_model(config.model, 1000)
    shapes = {shape for p in module.parameters() for shape in (p.shape, p.T.shape if p.ndim == 2 else p.shape)}
    saved: dict[int, int] = {}
    kept = []

    def save(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        if tensor.shape not in shapes:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids, lengths, positions = torch.arange(512), torch.arange(0, 513, 128), torch.arange(128).repeat(4)
    labelled = torch.arange(0, 512, 5)
    hooks = torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        module(ids, lengths.int(), positions, labelled)
    activations = memory.step_bytes(config.changed({"parallel.engine": "ddp"}), 1, rows=4).activations
    assert activations == pytest.approx(sum(saved.values()), rel=0.05)
