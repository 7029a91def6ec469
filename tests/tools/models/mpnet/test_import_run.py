"""Runs imported from annotated-mpnet: every value arrives, and training goes on where it was."""

import argparse
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign import RunsCode
from running import Enc
from safetensors.torch import load_file
from tiny_mpnet import ANNOTATED
from torch import Tensor

import enc as package
from enc.encoder.checkpoints.folder import read_trainer_state, verify
from enc.encoder.config.load import load_text
from enc.encoder.config.schema import RunConfig
from enc.encoder.engine.ddp import DdpEngine
from enc.encoder.errors import UsageError
from enc.encoder.models.mpnet.config import MpnetConfig
from enc.encoder.run.pretraining import build_model
from enc.tools.annotated_mpnet.flags import keys_of_args
from enc.tools.import_run import Imported, import_run
from enc.tools.models.mpnet.names import own_tensors
from enc.tools.readers.detect import open_source

CHECKPOINT = ANNOTATED / "checkpoint10.pt"
OPTIMIZER = "optimizer/checkpoint10_optimizer_state.pt"
MOMENTS = ("exp_avg", "exp_avg_sq")
# Bits for a predicted token and learning rates that annotated-mpnet printed at steps 11 to 15.
BITS = (9.4031, 9.4279, 9.4335, 9.3078, 9.4421)
RATES = (0.0005, 0.00044444, 0.00038889, 0.00033333, 0.00027778)


def copied(tmp_path: Path) -> Path:
    """Return a copy of the training folder that a test may change."""
    return Path(shutil.copytree(ANNOTATED, tmp_path / "old"))


def imported(path: Path, out: Path, trust: bool = False, **more) -> tuple[Imported, RunConfig]:
    source = open_source(path, trust)
    keys = keys_of_args(source.config or {})
    found = import_run(source, out, load_text("{}", "the default config", keys | more).config, None)
    return found, load_text((out / "config.yaml").read_text(), "config.yaml").config


def state_of(found: Imported) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    folder = found.run_dir / "checkpoints" / str(found.step)
    assert verify(folder).state == "complete"
    return load_file(folder / "model.safetensors"), load_file(folder / "state" / "moments.safetensors")


def theirs() -> tuple[dict[str, Tensor], dict[str, dict[int, dict[str, Tensor]]], list[str]]:
    """Return their weights, their optimizer's state dict, and its parameters' names in order of their numbers."""
    weights = torch.load(CHECKPOINT, weights_only=True)["model_states"]
    state = torch.load(ANNOTATED / OPTIMIZER, weights_only=True)["optimizer"]
    named = [name for name in weights if name != "lm_head.weight"]  # the tied head is no parameter of its own
    order = [n for n in named if weights[n].ndim > 1] + [n for n in named if weights[n].ndim == 1]
    return weights, state, order


def test_every_value_is_carried_over(tmp_path: Path) -> None:
    """Weights, and both moments of every parameter, are theirs bit for bit; so are step and config."""
    found, config = imported(CHECKPOINT, tmp_path / "run")
    assert (found.step, found.has_moments) == (10, True)
    weights, moments = state_of(found)
    old, state, order = theirs()
    expected = {own: t for name, tensor in old.items() for own, t in own_tensors(name, tensor, 1).items()}
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    wanted = {
        f"{kind}.{own}": tensor
        for number, name in enumerate(order)
        for kind in MOMENTS
        for own, tensor in own_tensors(name, state["state"][number][kind], 1).items()
    }
    assert moments.keys() == wanted.keys()
    assert all(torch.equal(moments[name], wanted[name]) for name in wanted)
    assert len(moments) == 2 * len(weights)
    saved = read_trainer_state(found.run_dir / "checkpoints" / "10")
    assert (saved["step"], saved["optimizer_steps"], saved["data_fingerprint"]) == (10, 10, None)
    assert isinstance(config.model, MpnetConfig)
    assert (config.model.hidden_size, config.model.num_buckets, config.model.vocab_size) == (32, 32, 768)
    assert (config.model.pad_token_id, config.model.dropout_prob, config.objective) == (1, 0.0, "mpnet")
    assert (config.optimizer.betas, config.optimizer.eps, config.optimizer.decay_embeddings) == (
        (0.9, 0.98),
        1e-6,
        True,
    )
    assert (config.scheduler.name, config.scheduler.warmup_steps) == ("polynomial_decay", 2)
    assert (config.scheduler.final_lr_ratio, config.trainer.max_steps, config.seed) == (0.0, 20, 12345)
    assert (config.trainer.global_batch_size, config.trainer.save_total_limit) == (16, None)


def test_the_next_update_is_theirs(tmp_path: Path) -> None:
    """AdamW goes on from the imported state as from the original one, given the same gradients."""
    found, config = imported(CHECKPOINT, tmp_path / "run")
    weights, moments = state_of(found)
    model, objective = build_model(config, 700)
    engine = DdpEngine(objective, model, config.parameters, config.optimizer, None, 1)
    engine.load((weights | moments).__getitem__, 10)
    old, state, order = theirs()
    generator = torch.Generator().manual_seed(0)
    parameters = {name: torch.nn.Parameter(old[name].clone()) for name in order}
    for parameter in parameters.values():
        parameter.grad = torch.empty(parameter.shape).normal_(0, 0.1, generator=generator)
    groups = [[p for p in parameters.values() if p.ndim > 1], [p for p in parameters.values() if p.ndim == 1]]
    continued = torch.optim.AdamW([{"params": group} for group in groups], lr=1e-3)
    continued.load_state_dict(state)
    for name, parameter in model.named_parameters():
        gradient = {own: t for n, p in parameters.items() for own, t in own_tensors(n, p.grad, 1).items()}[name]
        parameter.grad = gradient.clone()
    for optimizer in (continued, engine.optimizer):
        for group in optimizer.param_groups:
            group["lr"] = 5e-4
        optimizer.step()
    after = {own: t for n, p in parameters.items() for own, t in own_tensors(n, p.detach(), 1).items()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), after[name], rtol=1e-6, atol=1e-8, msg=name)
    assert any(not torch.equal(after[name], weights[name]) for name in after)


def test_an_imported_run_goes_on(enc: Enc) -> None:
    """`enc resume` continues with their learning rates, and at the loss in bits that they printed."""
    (enc.folder / "text").mkdir()
    shutil.copy(
        Path(package.__file__).parent / "LICENSE", enc.folder / "text" / "license.txt"
    )  # what it was trained on
    done = enc("ckpt", "import", str(ANNOTATED), "--out", "run", "dataset.path=text", "trainer.eval_strategy=no")
    assert "Imported step 10, weights and optimizer moments" in done.stderr
    assert "collator_rng_state" in done.stderr
    resumed = enc("resume", "latest", "--run", "run", "trainer.mixed_precision=no", "--allow-change", code=None)
    assert resumed.returncode == 0, resumed.stderr
    records = enc.records("run")
    assert sorted(records) == list(range(11, 21))
    for step, (bits, rate) in enumerate(zip(BITS, RATES, strict=True), start=11):
        assert records[step]["learning_rate"] == pytest.approx(rate, rel=1e-4)
        assert records[step]["loss"] / math.log(2) == pytest.approx(bits, abs=0.25)
        assert 0.5 < records[step]["grad_norm"] < 2


def _save(path: Path, **changes) -> None:
    content = torch.load(path, weights_only=True)
    torch.save({key: value for key, value in (content | changes).items() if value is not None}, path)


def test_old_checkpoints_become_a_run_at_step_0(enc: Enc) -> None:
    """Without data_state only the weights count, and without its file there are no moments; both is said."""
    old = copied(enc.folder)
    (old / OPTIMIZER).unlink()
    done = enc("ckpt", "import", "old", "--out", "weights")
    assert "Imported step 10, weights only" in done.stderr
    assert "moments of the optimizer: there are none" in done.stderr
    _save(old / "checkpoint10.pt", data_state=None)
    done = enc("ckpt", "import", "old/checkpoint10.pt", "--out", "legacy")
    assert "Imported step 0, weights only" in done.stderr
    assert "without data_state" in done.stderr
    for run, step in (("weights", 10), ("legacy", 0)):
        folder = enc.folder / run / "checkpoints" / str(step)
        assert not any(tensor.any() for tensor in load_file(folder / "state" / "moments.safetensors").values())


def test_pickles_are_read_only_when_trusted(enc: Enc) -> None:
    """An old file with numpy and a Namespace is refused with the option's name, and imported with it."""
    old = copied(enc.folder)
    content = torch.load(old / "checkpoint10.pt", weights_only=True)
    content |= {"args": argparse.Namespace(**content["args"]), "rng_state": {"numpy": np.random.default_rng(0)}}
    torch.save(content, old / "checkpoint10.pt")
    refused = enc("ckpt", "import", "old", "--out", "run", code=2)
    assert "--trust-checkpoint" in refused.stderr
    assert not (enc.folder / "run").exists()
    done = enc("ckpt", "import", "old", "--out", "run", "--trust-checkpoint")
    assert "may run any code" in done.stderr
    enc("ckpt", "import", str(ANNOTATED), "--out", "plain")
    for file in ("model.safetensors", "state/moments.safetensors", "trainer_state.json"):
        first, second = (enc.folder / run / "checkpoints" / "10" / file for run in ("run", "plain"))
        assert first.read_bytes() == second.read_bytes()


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    """Nor is anything written."""
    old = copied(tmp_path)
    torch.save(
        torch.load(CHECKPOINT, weights_only=True) | {"rng_state": RunsCode(tmp_path / "ran")}, old / CHECKPOINT.name
    )
    with pytest.raises(UsageError, match=r"posix\.mkdir"):
        open_source(old / CHECKPOINT.name)
    assert not (tmp_path / "ran").exists()


def _other_step(old: Path) -> None:
    _save(old / OPTIMIZER, steps=12)


def _other_order(old: Path) -> None:
    state = torch.load(old / OPTIMIZER, weights_only=True)
    moments = state["optimizer"]["state"]
    moments[3], moments[4] = moments[4], moments[3]
    torch.save(state, old / OPTIMIZER)


def _other_tokenizer(old: Path) -> None:
    args = torch.load(old / "checkpoint10.pt", weights_only=True)["args"]
    _save(old / "checkpoint10.pt", args=args | {"original_vocab_size": 701})


def _segments(old: Path) -> None:
    states = torch.load(old / "checkpoint10.pt", weights_only=True)["model_states"]
    extra = {"sentence_encoder.segment_embeddings.weight": torch.zeros(2, 32)}
    _save(old / "checkpoint10.pt", model_states=states | extra)


def _no_tokenizer(old: Path) -> None:
    shutil.rmtree(old / "tokenizer")


REFUSED = {
    "an optimizer of another step": (_other_step, "of step 10, the optimizer in .* of step 12"),
    "an optimizer in another order": (_other_order, "parameter 3 of its optimizer should be"),
    "another tokenizer": (_other_tokenizer, "original_vocab_size 701, the one given has 700"),
    "segments": (_segments, "segment_embeddings.weight, for which an MPNet here has no place"),
    "no tokenizer": (_no_tokenizer, "--tokenizer DIR"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_fit_is_refused(kind: str, tmp_path: Path) -> None:
    """One sentence says what and what to do, and no run folder is made."""
    change, message = REFUSED[kind]
    old = copied(tmp_path)
    change(old)
    with pytest.raises(UsageError, match=message):
        imported(old / "checkpoint10.pt", tmp_path / "run")
    assert [p.name for p in tmp_path.iterdir()] == ["old"]


def test_a_config_of_another_depth_is_refused(tmp_path: Path) -> None:
    """The tensors that do not fit are named."""
    with pytest.raises(UsageError, match=r"does not fit the model section.*layer\.2"):
        imported(CHECKPOINT, tmp_path / "run", **{"model.num_hidden_layers": 3})
