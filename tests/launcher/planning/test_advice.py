"""What may spoil a run in silence is said before it: by `config check`, `--dry-run` and the start."""

from pathlib import Path
from typing import Any

import pytest
from running import Enc

from enc.encoder.config.load import load_config
from enc.launcher.machine.facts import look
from enc.launcher.planning.advice import advice
from enc.launcher.planning.plan import plan_run

LONG_WARM_UP = {"scheduler.warmup_steps": 600}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, []),
        (LONG_WARM_UP | {"scheduler.warmup_percent": None}, ["The warm-up of 600 steps is not shorter than the run"]),
        (LONG_WARM_UP | {"scheduler.warmup_percent": 50}, []),
        ({"scheduler.total_steps": 300, "scheduler.final_lr_ratio": 0.0}, ["is 0 from step 300 on"]),
        ({"scheduler.total_steps": 300}, []),
        ({"dataset.validation_split": None}, ["Nothing will be evaluated"]),
        ({"dataset.validation_split": None, "trainer.eval_strategy": "no"}, []),
        ({"datacollator.pack_sequences": False}, ["a row of its own, of up to 128 tokens"]),
        ({"trainer.gradient_clipping": None}, ["Gradients are not clipped"]),
        ({"trainer.gradient_clipping": 0}, []),
    ],
)
def test_a_note_for_each_silent_ruin_and_none_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], said: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    notes = list(advice(plan_run(load_config("quickstart", keys).config, look())))
    assert len(notes) == len(said)
    assert all(words in note for words, note in zip(said, notes, strict=True))


def test_the_learning_rate_that_is_reached_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default warm-up of 10,000 steps and a run of 2,000: a fifth of the rate at its last step."""
    monkeypatch.chdir(tmp_path)
    keys = {"scheduler.warmup_percent": None, "trainer.max_steps": 2000}
    (note,) = advice(plan_run(load_config("quickstart", keys).config, look()))
    assert "ends at 20.0% of optimizer.lr" in note


@pytest.mark.parametrize("command", [["config", "check"], ["launch", "pretrain", "--dry-run"], ["launch", "pretrain"]])
def test_trouble_is_found_before_any_text_is_tokenised(enc: Enc, command: list[str]) -> None:
    """A package and a login that lack, a kernel that this machine has not, a source that is not there."""
    enc.environment = {**enc.environment, "WANDB_API_KEY": "", "HOME": str(enc.folder)}
    (enc.folder / "text.txt").write_text("Some text.\n" * 100)
    trouble = ["model.attn_backend=flash_attn_varlen", "wandb.enabled=true", "model.kernel_backend=fused"]
    place = ["tokenizer.train={vocab_size: 300}", "dataset.pre_tokenize_output=store", "trainer.use_cpu=true"]
    done = enc(*command, "quickstart", *place, "dataset.path=text.txt", *trouble, code=2)
    for words in ("attn_backend: flash_attn_varlen", "kernel_backend: fused", "WANDB_API_KEY"):
        assert words in done.stderr
    done = enc(*command, "quickstart", *place, "dataset.path=nowhere/", code=2)
    assert done.stderr.count("nowhere does not exist") == 1
    assert sorted(path.name for path in enc.folder.iterdir() if not path.name.startswith(".")) == ["text.txt"]


@pytest.mark.parametrize("command", ["launch pretrain quickstart --dry-run", "render slurm quickstart"])
def test_nodes_of_unknown_gpus_can_be_looked_at(enc: Enc, command: str) -> None:
    """Off a cluster a plan and a script are made for eight GPUs a node, and that is said; a launch does not guess."""
    done = enc(*command.split(), "--nodes", "4", "trainer.global_batch_size=64")
    assert "#SBATCH --gpus-per-node=8" in done.stdout
    assert "8 are assumed. --gpus-per-node N says it" in done.stderr
    assert "assumed" not in enc(*command.split(), "--nodes", "4", "--gpus-per-node", "2").stderr
    failed = enc("launch", "pretrain", "quickstart", "--nodes", "4", code=2)
    assert "How many GPUs a node has is not known" in failed.stderr
