"""The number of ranks changes nothing but rounding."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from running import Enc

OPTIONS = ["trainer.max_steps=20", "trainer.global_batch_size=8", "trainer.per_device_train_batch_size=4",
           "trainer.save_steps=10", "trainer.save_total_limit=0"]  # fmt: skip


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str], store: Path) -> Enc:
    single = Enc(tmp_path_factory.mktemp("one"), environment)
    ready = [f"dataset.pre_tokenize_output={store}", "trainer.output_dir=run"]
    single("launch", "pretrain", "smoke", *ready, *OPTIONS)
    return single


def compare(found: dict[int, dict], expected: dict[int, dict]) -> None:
    """Losses and gradient norms to 1e-5 relative, counts exactly."""
    assert found.keys() == expected.keys()
    for step, record in expected.items():
        for key in ("num_labels", "tokens", "fill", "learning_rate"):
            assert found[step][key] == record[key], (step, key)
        for key in ("loss", "grad_norm"):
            assert found[step][key] == pytest.approx(record[key], rel=1e-5), (step, key)


@pytest.mark.parametrize("world_size", [2, 4])
def test_losses_do_not_depend_on_the_number_of_ranks(
    enc: Enc, smoke: Callable[..., list[str]], one_rank: Enc, world_size: int
) -> None:
    """20 fp32 steps on 1, 2 and 4 ranks: label counts equal, losses and gradient norms to 1e-5."""
    enc(*smoke("run", *OPTIONS, f"launch.nproc_per_node={world_size}"))
    compare(enc.records("run"), one_rank.records("run"))
    ours, theirs = enc.records("run", "eval_loss"), one_rank.records("run", "eval_loss")
    assert ours[20]["eval_loss"] == pytest.approx(theirs[20]["eval_loss"], rel=1e-5)
    assert ours[20]["eval_labels"] == theirs[20]["eval_labels"]


def test_a_run_goes_on_with_another_number_of_ranks(enc: Enc, smoke: Callable[..., list[str]], one_rank: Enc) -> None:
    """Ten steps on two ranks, then ten on one."""
    enc(*smoke("run", *OPTIONS, "launch.nproc_per_node=2"))
    shutil.rmtree(enc.folder / "run" / "checkpoints" / "20")
    done = enc("resume", "latest", "--run", "run", "--nproc", "1")
    assert "launch.nproc_per_node: 2 -> 1" in done.stderr
    compare(enc.records("run"), one_rank.records("run"))


def test_launch_env_reaches_the_ranks(enc: Enc, smoke: Callable[..., list[str]]) -> None:
    """On this machine as on a cluster: here the number of threads, which the trainer prints."""
    done = enc(*smoke("run", "trainer.max_steps=1", "launch.env.OMP_NUM_THREADS='1'"))
    assert "CPU, 1 threads" in done.stderr
