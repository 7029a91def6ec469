"""A run that is killed and resumed goes through the same numbers, to the last bit, as one that was left alone."""

import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from running import Enc, exact

STEPS = 60
MPNET = ["model.type=mpnet", *(f"model.{name}dropout_prob=0.1" for name in ("", "attention_", "activation_"))]
COMMON = [
    f"trainer.max_steps={STEPS}",
    "trainer.save_steps=9",
    "trainer.save_total_limit=2",
    "model.dropout_prob=0.1",
    "trainer.gradient_accumulation_steps=2",
    "trainer.log_train_accuracy=true",
]


def wait_for_step(enc: Enc, run: str, step: int, process) -> None:
    """Wait until a run has logged a step, or has ended."""
    path = enc.folder / run / "metrics.jsonl"
    limit = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < limit:
        if path.exists() and any(f'"step": {step},' in line for line in path.read_text().splitlines()):
            return
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("nproc", "workers", "eval_steps"),
    [
        pytest.param(1, 3, 1000, marks=pytest.mark.slow),
        (2, 3, 7),
        pytest.param(1, 0, 7, marks=pytest.mark.slow),
        pytest.param(2, 0, 1000, marks=pytest.mark.slow),
    ],
)
def test_killed_runs_repeat_every_bit(
    enc: Enc, smoke: Callable[..., list[str]], nproc: int, workers: int, eval_steps: int
) -> None:
    """60 steps in one go equal 60 steps with five SIGKILLs: losses, gradient norms, evaluations, weights file."""
    options = [
        *COMMON,
        f"launch.nproc_per_node={nproc}",
        f"dataset.num_workers={workers}",
        f"trainer.eval_steps={eval_steps}",
    ]
    enc(*smoke("whole", *options))
    draw = random.Random(nproc * 10 + workers)
    kills = sorted(draw.sample(range(10, STEPS - 2), 5))
    for number, step in enumerate(kills):
        words = smoke("killed", *options) if number == 0 else ["resume", "latest", "--run", "killed"]
        process = enc.start(*words)
        wait_for_step(enc, "killed", step, process)
        time.sleep(draw.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    enc("resume", "latest", "--run", "killed")

    assert exact(enc.records("killed")) == exact(enc.records("whole"))
    assert exact(enc.records("killed", "eval_loss")) == exact(enc.records("whole", "eval_loss"))
    assert len(enc.records("whole")) == STEPS
    files = [Path(enc.folder, run, "checkpoints", str(STEPS), "model.safetensors") for run in ("whole", "killed")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param(["fsdp"], id="fsdp", marks=pytest.mark.slow),
        pytest.param(["deepspeed", "parallel.zero_stage=3"], id="deepspeed"),
    ],
)
def test_killed_sharded_runs_repeat_every_bit(enc: Enc, smoke: Callable[..., list[str]], engine: list[str]) -> None:
    """The same on two ranks that share the state, in bf16 with dropout: killed once, resumed, the same bits."""
    options = ["trainer.max_steps=24", "trainer.save_steps=5", "trainer.eval_steps=7", "model.dropout_prob=0.1",
               "trainer.mixed_precision=bf16", "launch.nproc_per_node=2", "parallel.bucket_size=100000",
               f"parallel.engine={engine[0]}", *engine[1:]]  # fmt: skip
    enc(*smoke("whole", *options))
    process = enc.start(*smoke("killed", *options))
    wait_for_step(enc, "killed", 13, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    enc("resume", "latest", "--run", "killed")
    assert exact(enc.records("killed")) == exact(enc.records("whole"))
    assert exact(enc.records("killed", "eval_loss")) == exact(enc.records("whole", "eval_loss"))
    files = [Path(enc.folder, run, "checkpoints", "24", "model.safetensors") for run in ("whole", "killed")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param(["ddp", "launch.nproc_per_node=1"], id="one"),
        pytest.param(["ddp"], id="ddp", marks=pytest.mark.slow),
        pytest.param(["fsdp"], id="fsdp", marks=pytest.mark.slow),
        pytest.param(["deepspeed", "parallel.zero_stage=2"], id="zero2", marks=pytest.mark.slow),
    ],
)
def test_killed_mpnet_runs_repeat_every_bit(enc: Enc, smoke: Callable[..., list[str]], engine: list[str]) -> None:
    """Masked and permuted training of an MPNet with all three dropouts: killed once, resumed, the same bits."""
    options = [*MPNET, "trainer.max_steps=24", "trainer.save_steps=5", "trainer.eval_steps=7",
               "datacollator.whole_word=true", "trainer.gradient_accumulation_steps=2", "launch.nproc_per_node=2",
               "parallel.bucket_size=100000", f"parallel.engine={engine[0]}", *engine[1:]]  # fmt: skip
    enc(*smoke("whole", *options))
    process = enc.start(*smoke("killed", *options))
    wait_for_step(enc, "killed", 13, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    enc("resume", "latest", "--run", "killed")
    assert exact(enc.records("killed")) == exact(enc.records("whole"))
    assert exact(enc.records("killed", "eval_loss")) == exact(enc.records("whole", "eval_loss"))
    files = [Path(enc.folder, run, "checkpoints", "24", "model.safetensors") for run in ("whole", "killed")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
def test_compiled_runs_repeat_every_bit(enc: Enc, smoke: Callable[..., list[str]]) -> None:
    """The same with torch.compile: a run that was stopped half way ends in the same weights."""
    options = ["trainer.max_steps=12", "trainer.save_steps=6", "trainer.torch_compile=true"]
    enc(*smoke("whole", *options), timeout=600)
    enc(*smoke("resumed", *options), timeout=600)
    shutil.rmtree(enc.folder / "resumed" / "checkpoints" / "12")
    enc("resume", "latest", "--run", "resumed", timeout=600)
    assert exact(enc.records("resumed")) == exact(enc.records("whole"))
    files = [Path(enc.folder, run, "checkpoints", "12", "model.safetensors") for run in ("whole", "resumed")]
    assert files[0].read_bytes() == files[1].read_bytes()
