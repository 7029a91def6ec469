"""The loop: what is equal whatever the split, and what each switch does."""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import pytest
import torch
from running import Enc
from safetensors.torch import load_file

STEPS = 8
OPTIONS = [f"trainer.max_steps={STEPS}", "trainer.eval_steps=4", "trainer.save_steps=4"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str], store: Path) -> Enc:
    """Eight fp32 steps of eight rows in one microbatch."""
    enc = Enc(tmp_path_factory.mktemp("plain"), environment)
    ready = [f"dataset.pre_tokenize_output={store}", "trainer.output_dir=run"]
    enc("launch", "pretrain", "smoke", *ready, *OPTIONS, "trainer.per_device_train_batch_size=8")
    return enc


def losses(enc: Enc, run: str = "run") -> list[float]:
    return [record["loss"] for record in enc.records(run).values()]


@pytest.mark.parametrize(
    ("change", "tolerance"),
    [
        (["trainer.per_device_train_batch_size=2", "trainer.gradient_accumulation_steps=4"], 1e-5),
        (["trainer.masked_logits_only_loss=false"], 1e-5),
        (["trainer.last_layer_of_labels_only=false"], 1e-6),
        (["trainer.gradient_checkpointing=true"], 1e-6),
        (["trainer.torch_compile=true", "trainer.torch_compile_backend=aot_eager"], 1e-5),
        (["trainer.mixed_precision=bf16"], 1e-2),
    ],
    ids=["accumulation", "all logits", "whole last layer", "recompute", "compiled", "bf16"],
)
def test_same_losses_by_another_way(
    enc: Enc, smoke: Callable[..., list[str]], plain: Enc, change: list[str], tolerance: float
) -> None:
    """Splitting, the ablation, recomputing and compiling change nothing but rounding; bf16 stays close."""
    enc(*smoke("run", *OPTIONS, "trainer.per_device_train_batch_size=8", *change))
    assert losses(enc) == pytest.approx(losses(plain), rel=tolerance)
    norms = [[record["grad_norm"] for record in e.records("run").values()] for e in (enc, plain)]
    assert norms[0] == pytest.approx(norms[1], rel=max(10 * tolerance, 1e-5))


def test_records_and_events_are_complete(plain: Enc) -> None:
    """Every metric that the docs name is in every record, and the events tell the run's story."""
    keys = {"step", "time", "loss", "grad_norm", "learning_rate", "num_labels", "tokens", "tokens_per_s", "mfu", "fill",
            "logsumexp", "data_wait_s", "forward_s", "backward_s", "optimizer_s", "step_s", "max_memory_mb",
            "nonfinite_steps", "weight_norm", "save_stall_s", "loss_bits"}  # fmt: skip
    records = plain.records("run")
    assert all(record.keys() == keys for record in records.values())
    assert list(records) == list(range(1, STEPS + 1))
    assert all(record["fill"] > 0.98 for record in records.values())
    assert {record["mfu"] for record in records.values()} == {None}  # a CPU has no peak rate
    assert "MFU" not in (plain.folder / "run" / "logs" / "1" / "console.log").read_text()
    assert [e["event"] for e in plain.events("run")] == ["started", "saved", "saved", "finished"]
    evaluations = plain.records("run", "eval_loss")
    assert list(evaluations) == [4, 8]
    launch = json.loads((plain.folder / "run" / "launches" / "1" / "launch.json").read_text())
    assert launch["attempt"] == 1
    assert "torch" in (plain.folder / "run" / "launches" / "1" / "environment.txt").read_text()
    assert list((plain.folder / "run" / "tensorboard").iterdir())


def test_logged_losses_are_means_over_labels(enc: Enc, smoke: Callable[..., list[str]], plain: Enc) -> None:
    """A log line every four steps is the label-weighted mean of the four."""
    enc(*smoke("run", *OPTIONS, "trainer.per_device_train_batch_size=8", "trainer.logging_steps=4"))
    records = list(plain.records("run").values())[:4]
    expected = sum(r["loss"] * r["num_labels"] for r in records) / sum(r["num_labels"] for r in records)
    assert losses(enc)[0] == pytest.approx(expected, rel=1e-12)


def test_the_parts_of_a_step_add_up_to_it(enc: Enc, smoke: Callable[..., list[str]]) -> None:
    """Waiting, forward, backward and update make up most of the step's time, however many steps a line covers."""
    enc(*smoke("run", *OPTIONS, "trainer.per_device_train_batch_size=16", "trainer.logging_steps=4"))
    for record in enc.records("run").values():
        parts = sum(record[f"{part}_s"] for part in ("data_wait", "forward", "backward", "optimizer"))
        assert 0.5 * record["step_s"] < parts <= record["step_s"]


def test_evaluating_a_checkpoint_repeats_the_runs_number(plain: Enc) -> None:
    """`enc eval mlm` gives the evaluation of the run, to the last bit."""
    metrics = json.loads(plain("eval", "mlm", "run", "--json").stdout)
    record = plain.records("run", "eval_loss")[STEPS]
    assert metrics == {key: record[key] for key in metrics}


def test_without_packing_each_piece_is_a_row(enc: Enc, smoke: Callable[..., list[str]]) -> None:
    """One document a row: fewer tokens, nothing padded."""
    enc(*smoke("run", *OPTIONS, "datacollator.pack_sequences=false", "trainer.per_device_train_batch_size=8"))
    assert all(record["fill"] < 0.95 for record in enc.records("run").values())


LEARNS = ["trainer.max_steps=24", "trainer.eval_strategy=no", "trainer.save_strategy=no"]
OTHER_SWITCHES = ["datacollator.whole_word=true", "datacollator.mask_all=true", "model.tie_word_embeddings=false",
                  "model.rms_norm=false", "model.rope=false", "model.hidden_act=gelu", "model.dropout_prob=0.1",
                  "optimizer.name=adam", "scheduler.name=warmup_stable_decay"]  # fmt: skip


def fall(found: list[float]) -> float:
    return mean(found[:4]) - mean(found[-4:])


def test_other_switches_learn_and_export(enc: Enc, smoke: Callable[..., list[str]]) -> None:
    """The loss falls, and the export, which compares logits, holds another output matrix than the embedding."""
    enc(*smoke("run", *LEARNS, *OTHER_SWITCHES))
    assert fall(losses(enc)) > 0.3
    weights = load_file(Path(enc("ckpt", "export", "run").stdout.strip()) / "model.safetensors")
    matrices = [tensor for tensor in weights.values() if tensor.shape == (1024, 64)]
    assert len(matrices) == 2
    assert not torch.equal(*matrices)


def test_ngpt_learns(enc: Enc, smoke: Callable[..., list[str]]) -> None:
    """Slowly at this learning rate, but steadily."""
    enc(*smoke("run", *LEARNS, "model.ngpt=true"))
    assert fall(losses(enc)) > 0.03


def test_overwriting_moves_the_older_run_aside(enc: Enc, smoke: Callable[..., list[str]]) -> None:
    """Nothing of the older run is lost."""
    short = ["trainer.max_steps=2", "trainer.eval_strategy=no"]
    enc(*smoke("run", *short))
    before = (enc.folder / "run" / "metrics.jsonl").read_bytes()
    done = enc(*smoke("run", *short, "trainer.overwrite_output_dir=true"))
    moved = enc.folder / "run.replaced-1"
    assert str(moved) in done.stderr
    assert (moved / "metrics.jsonl").read_bytes() == before
    assert (moved / "checkpoints" / "2" / "manifest.json").exists()
    assert len(enc.records("run")) == 2


@pytest.mark.parametrize(("key", "value"), [("attn_backend", "flash_attn_varlen"), ("kernel_backend", "liger")])
def test_a_run_that_insists_on_fused_kernels_does_not_start_without(
    enc: Enc, smoke: Callable[..., list[str]], key: str, value: str
) -> None:
    """One sentence says which key and why; nothing was trained."""
    done = enc(*smoke("run", f"model.{key}={value}", "trainer.use_cpu=true"), code=2)
    assert f"model.{key}" in done.stderr
    assert "the CPU" in done.stderr.split(", but ")[1]
    assert not (enc.folder / "run" / "checkpoints").exists()
