"""Runs imported from NeoBERT: every value arrives, and training goes on where it was."""

import random
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from foreign import ACCELERATE
from running import Enc
from safetensors.torch import load_file, save_file

from enc.encoder.checkpoints.folder import read_trainer_state, verify
from enc.encoder.config.load import load_text
from enc.encoder.config.schema import RunConfig
from enc.encoder.data.tokenizer import EncoderTokenizer
from enc.encoder.errors import UsageError
from enc.encoder.models.build import init_weights
from enc.encoder.models.neobert.config import NeoBertConfig
from enc.encoder.models.neobert.model import NeoBertForMaskedLM
from enc.encoder.models.registry import parameters_of
from enc.tools.import_run import import_run
from enc.tools.models.neobert.export import hf_config
from enc.tools.models.neobert.names import hub_keys
from enc.tools.readers.detect import open_source

SOURCE = ACCELERATE / "checkpoints" / "10"
TOKENIZER = SOURCE / "tokenizer"
MOMENTS = ("exp_avg", "exp_avg_sq")
# Some parameters and their numbers in the optimizer of the fixture.
PLACES = {
    0: "model.transformer_encoder.0.qkv.weight",
    4: "model.transformer_encoder.0.ffn.w3.weight",
    10: "decoder.weight",
    11: "model.encoder.weight",
    16: "model.layer_norm.weight",
}
# What NeoBERT printed at steps 11 to 13 of the run that the fixture is from (the rate is the next step's).
LOSSES = {11: 6.1913, 12: 6.1618, 13: 6.1621}
RATES = {11: 0.000775, 12: 0.000689058, 13: 0.000597038}


def config_of(folder: Path) -> RunConfig:
    return load_text((folder / "config.yaml").read_text(), "config.yaml").config


def state_of(run: Path, step: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    folder = run / "checkpoints" / str(step)
    assert verify(folder).state == "complete"
    return load_file(folder / "model.safetensors"), load_file(folder / "state" / "moments.safetensors")


def test_a_training_folder_is_carried_over_exactly(tmp_path: Path) -> None:
    """Weights by name, moments by their place in NeoBERT's optimizer, the step and the tokens."""
    found = import_run(open_source(SOURCE), tmp_path / "run", config_of(SOURCE), None)
    weights, moments = state_of(tmp_path / "run", 10)
    expected = load_file(SOURCE / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    state = torch.load(SOURCE / "optimizer.bin", weights_only=True)["state"]
    for number, name in PLACES.items():
        assert all(torch.equal(moments[f"{kind}.{name}"], state[number][kind]) for kind in MOMENTS), name
    assert len(moments) == 2 * len(state)
    saved = read_trainer_state(tmp_path / "run" / "checkpoints" / "10")
    assert (saved["step"], saved["optimizer_steps"], saved["tokens"], saved["data_fingerprint"]) == (10, 10, 5214, None)
    config = config_of(tmp_path / "run")
    assert not config.model.tie_word_embeddings
    assert config.trainer.global_batch_size == 16
    assert any("scheduler.bin" in line for line in found.not_carried)


def write_text(folder: Path) -> None:
    """Write text in the language of the fixture's tokenizer: numbered words, the first ones most frequent."""
    vocabulary = EncoderTokenizer.load(TOKENIZER).tokenizer.get_vocab()
    words = sorted(word for word in vocabulary if len(word) == 4 and word[0] == "w" and word[1:].isdigit())
    rng = random.Random(0)
    weights = [1 / (rank + 10) for rank in range(len(words))]
    lines = [" ".join(rng.choices(words, weights, k=rng.randint(20, 40))) for _ in range(600)]
    folder.mkdir()
    (folder / "train.txt").write_text("\n".join(lines[:500]))
    (folder / "validation.txt").write_text("\n".join(lines[500:]))


def test_an_imported_run_goes_on(enc: Enc) -> None:
    """`enc resume` continues with NeoBERT's learning rates, and with losses and gradients as before the import."""
    write_text(enc.folder / "text")
    imported = enc("ckpt", "import", str(ACCELERATE), "--out", "run", "dataset.path=text")
    assert imported.stdout == "run\n"
    assert "custom_checkpoint_0.pkl" in imported.stderr
    resumed = enc("resume", "latest", "--run", "run", "trainer.max_steps=20", "trainer.eval_strategy=no")
    assert "--allow-change" not in resumed.stderr
    records = enc.records("run")
    assert sorted(records) == list(range(11, 21))
    for step, rate in RATES.items():
        assert records[step]["learning_rate"] == pytest.approx(rate, rel=1e-5)
        assert records[step]["loss"] == pytest.approx(LOSSES[step], abs=0.15)
        assert 0.3 < records[step]["grad_norm"] < 3
    assert records[20]["loss"] < records[11]["loss"]


def test_a_deepspeed_run_is_carried_over(foreign: Path, tmp_path: Path) -> None:
    """The older layout: model_checkpoints/<tag> of DeepSpeed, config and tokenizer above it."""
    run = tmp_path / "old"
    shutil.copytree(foreign / "neobert", run / "model_checkpoints")
    shutil.copytree(TOKENIZER, run / "tokenizer")
    model = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 100}
    (run / "config.yaml").write_text(yaml.safe_dump({"model": model}))
    import_run(open_source(run / "model_checkpoints"), tmp_path / "run", config_of(run), None)
    weights, moments = state_of(tmp_path / "run", 3)
    expected = load_file(foreign / "neobert.safetensors")
    for name, tensor in {**weights, **moments}.items():
        assert torch.equal(tensor, expected[name]), name
    assert len(weights) + len(moments) == len(expected)
    config = config_of(tmp_path / "run")
    assert config.model.tie_word_embeddings
    assert config.trainer.global_batch_size == 32  # 16 rows on each of 2 ranks


FIELDS = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 100}


def release(folder: Path, num_rows: int) -> NeoBertForMaskedLM:
    """Write random weights as the first NeoBERT was released: w1 and w2 in one matrix, a head with a bias."""
    config = NeoBertConfig(**FIELDS, vocab_size=512, tie_word_embeddings=False, decoder_bias=True)
    model = NeoBertForMaskedLM(config, 512).eval()
    init_weights(model, parameters_of(config), 0)
    torch.nn.init.normal_(model.head_bias)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for layer in range(2):
        prefix = f"model.transformer_encoder.{layer}.ffn"
        state[f"{prefix}.w12.weight"] = torch.cat([state.pop(f"{prefix}.w{part}.weight") for part in (1, 2)])
    for name in ("model.encoder.weight", "decoder.weight", "decoder.bias"):
        extra = torch.zeros(max(0, num_rows - 512), *state[name].shape[1:])
        state[name] = torch.cat([state[name][:num_rows], extra])
    state["model.freqs_cis"] = torch.zeros(4, 2)
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    fields = {**FIELDS, "vocab_size": num_rows, "max_length": 64, "hidden_act": "SwiGLU"}
    (folder / "config.json").write_text(str(fields).replace("'", '"'))
    shutil.copy(TOKENIZER / "tokenizer.json", folder)
    shutil.copy(TOKENIZER / "tokenizer_config.json", folder)
    return model


@pytest.mark.parametrize("num_rows", [512, 500, 640])
def test_released_weights_become_a_run(tmp_path: Path, num_rows: int) -> None:
    """Rows are padded with zeros or, where they are zero, trimmed; bias and head come along, moments are zero."""
    model = release(tmp_path / "hub", num_rows)
    import_run(open_source(tmp_path / "hub"), tmp_path / "run", RunConfig(model=NeoBertConfig(**FIELDS)), None)
    weights, moments = state_of(tmp_path / "run", 0)
    for name, tensor in model.state_dict().items():
        rows = min(num_rows, 512) if name in ("model.encoder.weight", "decoder.weight", "decoder.bias") else None
        assert torch.equal(weights[name][:rows], tensor[:rows])
        assert rows is None or not weights[name][rows:].any()
    assert not any(moment.any() for moment in moments.values())
    config = config_of(tmp_path / "run").model
    assert (config.decoder_bias, config.tie_word_embeddings, config.vocab_size) == (True, False, 512)


def test_a_released_folder_needs_no_config(enc: Enc) -> None:
    """Its config.json gives the model section, and the imported run exports with its bias."""
    model = release(enc.folder / "hub", 512)
    enc("ckpt", "import", "hub", "--out", "run", "dataset.max_seq_length=64")
    assert config_of(enc.folder / "run").model.max_position_embeddings == 64
    out = enc("ckpt", "export", "run").stdout.strip()
    assert torch.equal(load_file(enc.folder / out / "model.safetensors")["decoder.bias"], model.head_bias)


def test_every_key_of_an_export_comes_back() -> None:
    """The config of an exported model gives the section that it was exported from, its length of rows too."""
    section = NeoBertConfig(
        hidden_size=96, num_hidden_layers=3, num_attention_heads=6, intermediate_size=200, max_position_embeddings=64,
        hidden_act="gelu", rope=False, rms_norm=False, norm_eps=1e-4, dropout_prob=0.2, embedding_init_range=0.03,
        decoder_init_range=0.05, classifier_init_range=0.07, final_logit_softcapping=3.0,
    )  # fmt: skip
    keys = hub_keys(hf_config(section, 1000).to_dict(), Path("config.json"))
    config = RunConfig().changed(keys)
    assert config.model.model_copy(update={"vocab_size": section.vocab_size}) == section
    assert config.dataset.max_seq_length == 64


def test_a_head_that_is_a_copy_is_tied(tmp_path: Path) -> None:
    """NeoBERT's portable weights hold a tied head twice."""
    release(tmp_path / "hub", 512)
    state = load_file(tmp_path / "hub" / "model.safetensors")
    del state["decoder.bias"]
    state["decoder.weight"] = state["model.encoder.weight"].clone()
    save_file(state, tmp_path / "hub" / "model.safetensors")
    import_run(open_source(tmp_path / "hub"), tmp_path / "run", RunConfig(model=NeoBertConfig(**FIELDS)), None)
    assert "decoder.weight" not in state_of(tmp_path / "run", 0)[0]
    assert config_of(tmp_path / "run").model.tie_word_embeddings


def _trained_rows(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["model.encoder.weight"][-1] = 1.0
    save_file(state, folder / "model.safetensors")


def _other_optimizer(folder: Path) -> None:
    shutil.copy(SOURCE / "optimizer.bin", folder)


REFUSED = {
    "trained rows": (640, _trained_rows, FIELDS, "rows, its tokenizer needs 512, and the rest were trained"),
    "another model": (
        512,
        lambda folder: None,
        {**FIELDS, "num_hidden_layers": 3},
        "missing: model.transformer_encoder.2",
    ),
    "another width": (512, lambda folder: None, {**FIELDS, "intermediate_size": 64}, "of another shape"),
    "an optimizer in another order": (512, _other_optimizer, FIELDS, "parameter 0 of the optimizer should be"),
}


def test_a_config_of_another_depth_is_refused(tmp_path: Path) -> None:
    """Of a training folder whose config is gone, the tensors that do not fit the defaults are named."""
    with pytest.raises(UsageError, match=r"does not fit the model section.*transformer_encoder\.2"):
        import_run(
            open_source(SOURCE),
            tmp_path / "run",
            RunConfig(model=NeoBertConfig(**{**FIELDS, "num_hidden_layers": 3})),
            None,
        )


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_fit_is_refused(tmp_path: Path, kind: str) -> None:
    """One sentence says which tensor, and no run folder is made."""
    num_rows, change, fields, message = REFUSED[kind]
    release(tmp_path / "hub", num_rows)
    change(tmp_path / "hub")
    with pytest.raises(UsageError, match=message):
        import_run(open_source(tmp_path / "hub"), tmp_path / "run", RunConfig(model=NeoBertConfig(**fields)), None)
    assert [p.name for p in tmp_path.iterdir()] == ["hub"]
