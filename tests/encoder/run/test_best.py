"""The best checkpoint is saved at once and kept, and the test at the end takes it, whatever stops the run meanwhile."""

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from running import Enc, exact

from enc.encoder.checkpoints.folder import find_checkpoint, list_checkpoints, read_trainer_state

STEPS = 24
# A learning rate that grows until things get worse: the best evaluation is neither the first nor the last.
OPTIONS = [f"trainer.max_steps={STEPS}", "trainer.eval_steps=3", "trainer.save_steps=8", "trainer.save_total_limit=1",
           "trainer.metric_for_best_model=eval_loss", "optimizer.lr=1", "scheduler.name=constant",
           "scheduler.warmup_steps=30", "model.dropout_prob=0.1"]  # fmt: skip

Words = Callable[..., list[str]]


@pytest.fixture(scope="module")
def tested_store(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Path:
    """The token store of the `smoke` recipe with a split for the test."""
    folder = tmp_path_factory.mktemp("tested_store")
    return folder / Enc(folder, environment)("preprocess", "smoke", "dataset.test_samples=40").stdout.strip()


@pytest.fixture
def words(tested_store: Path) -> Words:
    """Words that launch the recipe with `OPTIONS` on that store."""

    def build(run: str, *more: str) -> list[str]:
        ready = ["dataset.test_samples=40", f"dataset.pre_tokenize_output={tested_store}", f"trainer.output_dir={run}"]
        return ["launch", "pretrain", "smoke", *ready, *OPTIONS, *more]

    return build


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str], tested_store: Path) -> Enc:
    """The run that nobody stopped."""
    enc = Enc(tmp_path_factory.mktemp("whole"), environment)
    ready = ["dataset.test_samples=40", f"dataset.pre_tokenize_output={tested_store}", "trainer.output_dir=run"]
    enc("launch", "pretrain", "smoke", *ready, *OPTIONS)
    return enc


def bests(enc: Enc, run: str = "run", key: str = "eval_loss", sign: int = 1) -> list[int]:
    """Return the steps whose evaluation was better than all before, from the metrics."""
    found: list[tuple[float, int]] = []
    for step, record in enc.records(run, "eval_loss").items():
        if not found or sign * record[key] < found[-1][0]:
            found.append((sign * record[key], step))
    return [step for _, step in found]


def steps_of(enc: Enc, event: str, run: str = "run") -> list[int]:
    return [e["step"] for e in enc.events(run) if e["event"] == event]


def best_of(run: Path) -> Any:
    return read_trainer_state(find_checkpoint(run, "latest")[0])["best"]


def until(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    limit = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, f"the run ended before its moment came (exit code {process.returncode})"
        assert time.monotonic() < limit
        time.sleep(0.0005)


def says(run: Path, *texts: str) -> bool:
    path = run / "metrics.jsonl"
    return path.exists() and any(all(text in line for text in texts) for line in path.read_text().splitlines())


def test_the_best_is_saved_at_once_and_kept(whole: Enc) -> None:
    """Every evaluation that beats all before is a checkpoint; at the end there are the best one and the last one."""
    run, expected = whole.folder / "run", bests(whole)
    assert len(expected) > 1
    assert expected[-1] < STEPS
    assert steps_of(whole, "best") == expected
    assert steps_of(whole, "saved") == sorted({*expected, 8, 16, STEPS})
    assert [path.name for path in list_checkpoints(run)] == [str(expected[-1]), str(STEPS)]
    value = whole.records("run", "eval_loss")[expected[-1]]["eval_loss"]
    assert best_of(run) == {"metric": "eval_loss", "value": value, "step": expected[-1]}


def test_the_test_takes_the_best_weights_once(whole: Enc) -> None:
    """The record of the test is what `enc eval mlm` says of the best checkpoint; resuming repeats nothing."""
    run, best = whole.folder / "run", bests(whole)[-1]
    record = whole.records("run", "test_loss")[STEPS]
    assert record["test_step"] == best
    metrics = json.loads(whole("eval", "mlm", "run/best", "--split", "test", "--json").stdout)
    assert metrics == {key: record[key] for key in metrics}
    assert metrics["test_loss_bits"] == pytest.approx(metrics["test_loss"] * 1.4426950408889634)
    assert metrics != json.loads(whole("eval", "mlm", "run", "--split", "test", "--json").stdout)
    before = (run / "metrics.jsonl").read_bytes()
    whole("resume", "latest", "--run", "run")
    assert (run / "metrics.jsonl").read_bytes() == before
    assert steps_of(whole, "tested") == [STEPS]


def test_best_is_a_name_for_all_commands(whole: Enc) -> None:
    """`<run>/best` is the best checkpoint wherever a checkpoint is named, and `prune` leaves it."""
    best = str(bests(whole)[-1])
    assert whole("ckpt", "verify", "run/best").stdout == f"run/checkpoints/{best}: complete\n"
    assert f'"step": {best}' in whole("ckpt", "inspect", "run/best", "--json").stdout
    whole("ckpt", "export", "run/best", "--out", "exported")
    assert (whole.folder / "exported" / "model.safetensors").is_file()
    assert whole("ckpt", "prune", "run", "--keep", "1", "--dry-run").stdout == ""


@pytest.mark.parametrize(("metric", "sign"), [("eval_accuracy", -1), ("eval_perplexity", 1)])
def test_saving_the_best_only(enc: Enc, words: Words, metric: str, sign: int) -> None:
    """`save_strategy: best` saves nothing else but the end; ties are not better; the metric says what better means."""
    enc(*words("run", "trainer.save_strategy=best", f"trainer.metric_for_best_model={metric}"))
    expected = bests(enc, key=metric, sign=sign)
    assert steps_of(enc, "best") == expected
    assert steps_of(enc, "saved") == [*expected, *([STEPS] if expected[-1] != STEPS else [])]


@pytest.mark.parametrize(
    "parallel",
    [
        ["launch.nproc_per_node=1"],
        pytest.param(["launch.nproc_per_node=2"], marks=pytest.mark.slow),
        pytest.param(["launch.nproc_per_node=2", "parallel.engine=fsdp"], marks=pytest.mark.slow),
        pytest.param(
            ["launch.nproc_per_node=2", "parallel.engine=deepspeed", "parallel.zero_stage=3",
             "parallel.bucket_size=9999"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["one rank", "ddp", "fsdp", "zero 3"],
)  # fmt: skip
def test_killed_runs_have_the_same_best(enc: Enc, words: Words, parallel: list[str]) -> None:
    """Killed three times and resumed: the same evaluations, best checkpoint, weights and test, to the last bit."""
    enc(*words("whole", *parallel))
    for number, step in enumerate((5, 12, 19)):
        start = words("killed", *parallel) if number == 0 else ["resume", "latest", "--run", "killed"]
        process = enc.start(*start)
        until(lambda step=step: says(enc.folder / "killed", f'"step": {step},'), process)  # type: ignore[misc]
        process.send_signal(signal.SIGKILL)
        process.wait()
    enc("resume", "latest", "--run", "killed")
    assert best_of(enc.folder / "killed") == best_of(enc.folder / "whole")
    for key in ("loss", "eval_loss", "test_loss"):
        assert exact(enc.records("killed", key)) == exact(enc.records("whole", key))
    found = [find_checkpoint(enc.folder / run, "best")[0] for run in ("whole", "killed")]
    assert (found[0] / "model.safetensors").read_bytes() == (found[1] / "model.safetensors").read_bytes()
    kept = [path.name for path in list_checkpoints(enc.folder / "killed")]
    assert kept == list(dict.fromkeys([found[0].name, str(STEPS)]))
    assert enc.records("killed", "test_loss")[STEPS]["test_step"] == int(found[0].name)


def test_a_signal_in_the_best_evaluation(enc: Enc, words: Words, whole: Enc) -> None:
    """The checkpoint of that step is saved without knowing; the resumed run evaluates and saves it as the best."""
    best = bests(whole)[-1]
    process = enc.start(*words("run"))
    run = enc.folder / "run"
    until(lambda: says(run, f'"step": {best},', '"grad_norm"'), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 75
    enc("resume", "latest", "--run", "run")
    assert best_of(run) == best_of(whole.folder / "run")
    folder = find_checkpoint(run, "best")[0]
    assert read_trainer_state(folder)["best"]["step"] == best
    assert exact(enc.records("run", "test_loss")) == exact(whole.records("run", "test_loss"))


@pytest.mark.parametrize("nproc", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_signal_in_the_test(enc: Enc, words: Words, nproc: int) -> None:
    """It leaves with 75 and all checkpoints; the resumed run makes the test, and no step."""
    process = enc.start(*words("run", "trainer.per_device_eval_batch_size=1", f"launch.nproc_per_node={nproc}"))
    run = enc.folder / "run"
    log = run / "logs" / "1" / "console.log"
    until(lambda: log.exists() and "Testing the best checkpoint" in log.read_text(), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 75, (enc.folder / "background.log").read_text()
    assert enc.records("run", "test_loss") == {}
    assert find_checkpoint(run, "latest")[0].name == str(STEPS)
    before = enc.records("run")
    enc("resume", "latest", "--run", "run")
    assert enc.records("run") == before
    assert enc.records("run", "test_loss")[STEPS]["test_step"] == best_of(run)["step"]
    assert [e["event"] for e in enc.events("run")][-2:] == ["tested", "finished"]


def test_going_back_to_the_best(enc: Enc, words: Words, whole: Enc) -> None:
    """`enc resume best` goes on from it, knowing nothing of what came later, and ends where the run ended."""
    shutil.copytree(whole.folder / "run", enc.folder / "run")
    best = best_of(enc.folder / "run")["step"]
    done = enc("resume", "best", "--run", "run", "trainer.output_dir=run")
    assert f"Resuming from run/checkpoints/{best}." in " ".join(done.stderr.split()).replace(f"{enc.folder}/", "")
    for key in ("loss", "eval_loss", "test_loss"):
        assert exact(enc.records("run", key)) == exact(whole.records("run", key))


def test_a_best_checkpoint_that_is_gone_is_told(enc: Enc, words: Words, whole: Enc) -> None:
    """The next evaluation begins a new best, and without one the last weights are tested."""
    shutil.copytree(whole.folder / "run", enc.folder / "run")
    shutil.rmtree(find_checkpoint(enc.folder / "run", "best")[0])
    assert "There is no checkpoint" in enc("ckpt", "verify", "run/best", code=2).stderr
    more = ["trainer.max_steps=26", "--allow-change"]
    done = enc("resume", "latest", "--run", "run", *more)
    assert "is not in this run" in " ".join(done.stderr.split())
    assert best_of(enc.folder / "run")["step"] == 26
    assert [r["test_step"] for r in enc.records("run", "test_loss").values()] == [bests(whole)[-1], 26]


def test_an_evaluation_that_is_not_finite_is_never_best(enc: Enc, words: Words) -> None:
    """Weights that are ruined have no best checkpoint, whatever the metric; the last weights are tested."""
    ruin = ["optimizer.lr=1e38", "trainer.metric_for_best_model=eval_perplexity", "trainer.max_nonfinite_steps=100",
            "trainer.max_steps=6", "scheduler.warmup_steps=0"]  # fmt: skip
    enc(*words("run", *ruin))
    assert [r["eval_loss"] for r in enc.records("run", "eval_loss").values()] == [None, None]
    assert steps_of(enc, "best") == []
    assert enc.records("run", "test_loss")[6]["test_step"] == 6


def test_tensorboard_files_go_where_they_are_asked(enc: Enc, smoke: Callable[..., list[str]]) -> None:
    """The folder is that of the launch, wherever the run goes on from."""
    enc(*smoke("run", "trainer.max_steps=2", "trainer.tensorboard_dir=boards/a", "trainer.eval_strategy=no"))
    assert len(list((enc.folder / "boards" / "a").iterdir())) == 1
    assert f"tensorboard_dir: {enc.folder / 'boards' / 'a'}" in (enc.folder / "run" / "config.yaml").read_text()
    assert not (enc.folder / "run" / "tensorboard").exists()
    other = Enc(enc.folder / "elsewhere", enc.environment)
    other.folder.mkdir()
    other("resume", "latest", "--run", "../run", "trainer.max_steps=3", "--allow-change")
    assert len(list((enc.folder / "boards" / "a").iterdir())) == 2
