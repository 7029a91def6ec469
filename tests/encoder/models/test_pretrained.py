"""`model.init_from`: a run begins with the weights of a Hugging Face folder, and only with ones that fit."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from running import Enc
from safetensors.torch import load_file, save_file
from tiny_mpnet import ANNOTATED, NUM_TOKENS, tiny_mpnet
from transformers import MPNetConfig, MPNetForMaskedLM, MPNetModel

import enc as package
from enc.encoder.config.schema import RunConfig
from enc.encoder.errors import UsageError
from enc.encoder.models import first_weights as first
from enc.encoder.models.build import init_weights
from enc.encoder.models.mpnet import pretrained
from enc.encoder.models.mpnet.config import MpnetConfig
from enc.encoder.models.mpnet.model import MpnetForMaskedLM

logging.getLogger("transformers").setLevel(logging.ERROR)
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
HF = {**SIZES, "vocab_size": NUM_TOKENS, "max_position_embeddings": 66, "layer_norm_eps": 1e-5}


def check(config: RunConfig, num_tokens: int | None, tokenizer_dir: Path | None) -> None:
    """Check as a launch does."""
    first.check(config.model, config.tokenizer.train is not None, num_tokens, tokenizer_dir)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 132416\n"


def hf_folder(folder: Path, model_class: type = MPNetForMaskedLM, **changes) -> Path:
    """Write random weights as transformers saves them, with the tokenizer of 700 tokens."""
    torch.manual_seed(0)
    model = model_class(MPNetConfig(**{**HF, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    for file in (ANNOTATED / "tokenizer").iterdir():
        shutil.copy(file, folder)
    return folder


def config_for(folder: Path, **changes) -> RunConfig:
    fields = {**SIZES, "max_position_embeddings": 64, "vocab_size": 768, **changes}
    return RunConfig(model=MpnetConfig(**fields, init_from=str(folder)))


def filled(config: RunConfig) -> MpnetForMaskedLM:
    model = first_weights(config)
    pretrained.load(model, Path(str(config.model.init_from)), NUM_TOKENS)
    return model


def first_weights(config: RunConfig) -> MpnetForMaskedLM:
    model = MpnetForMaskedLM(config.model, NUM_TOKENS)
    init_weights(model, config.parameters, config.seed)
    return model


def test_every_weight_is_taken(tmp_path: Path) -> None:
    """Vocabulary rows are added as zeros up to a multiple of 128."""
    config = config_for(hf_folder(tmp_path / "hub"))
    check(config, NUM_TOKENS, tmp_path / "hub")
    assert first.notes(config.model) == []
    expected = load_file(tmp_path / "hub" / "model.safetensors")
    found = filled(config).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name][: len(tensor)], tensor), name
        assert not found[name][len(tensor) :].any()
    assert len(found["lm_head.bias"]) == 768


def test_an_encoder_alone_gets_a_new_head(tmp_path: Path) -> None:
    """MPNetModel has a pooler, which is left, and no head, which starts as in a fresh run; it is said."""
    config = config_for(hf_folder(tmp_path / "hub", MPNetModel))
    check(config, NUM_TOKENS, None)
    assert "no language-model head" in first.notes(config.model)[0]
    fresh, found = first_weights(config).state_dict(), filled(config).state_dict()
    expected = load_file(tmp_path / "hub" / "model.safetensors")
    assert any(name.startswith("pooler.") for name in expected)
    for name, tensor in found.items():
        if name.startswith("lm_head."):
            assert torch.equal(tensor, fresh[name])
        else:
            assert torch.equal(tensor[:NUM_TOKENS], expected[name.removeprefix("mpnet.")]), name


def test_a_longer_context_keeps_the_positions_that_there_are(tmp_path: Path) -> None:
    """The others are drawn as in a fresh run, and said; the buckets stay those of transformers."""
    longer = {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128}
    config = config_for(hf_folder(tmp_path / "hub"), max_position_embeddings=1024, **longer)
    check(config, NUM_TOKENS, None)
    assert "last 960 positions" in first.notes(config.model)[0]
    table = "mpnet.embeddings.position_embeddings.weight"
    found, fresh = filled(config).state_dict()[table], first_weights(config).state_dict()[table]
    assert torch.equal(found[:66], load_file(tmp_path / "hub" / "model.safetensors")[table])
    assert torch.equal(found[66:], fresh[66:])


def test_rows_that_fill_the_vocabulary_up_are_left(tmp_path: Path) -> None:
    """annotated-mpnet exports a vocabulary padded to a multiple of 128."""
    config = config_for(hf_folder(tmp_path / "hub", vocab_size=768))
    check(config, NUM_TOKENS, None)
    assert not filled(config).head_weight[NUM_TOKENS:].any()


def _edit_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def _old_format(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _without_a_layer(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: t for name, t in tensors.items() if "layer.1" not in name}, folder / "model.safetensors")


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no folder": (shutil.rmtree, "no folder with a config.json"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{") and None, "is not JSON"),
    "another model": (lambda folder: _edit_config(folder, model_type="bert"), "type 'bert', not an MPNet"),
    "strange sizes": (lambda folder: _edit_config(folder, hidden_size=-4), "values that no MPNet has"),
    "other sizes": (lambda folder: _edit_config(folder, hidden_size=64), "does not hold what the config.json"),
    "64 buckets": (lambda folder: _edit_config(folder, relative_attention_num_buckets=64), "computes with 32"),
    "another activation": (lambda folder: _edit_config(folder, hidden_act="relu"), "head of transformers' MPNet"),
    "an untied head": (lambda folder: _edit_config(folder, tie_word_embeddings=False), "untied"),
    "no weights": (_old_format, "enc ckpt consolidate"),
    "damaged weights": (_cut_short, "is damaged"),
    "a pointer": (lambda folder: (folder / "model.safetensors").write_text(POINTER), "git lfs pull"),
    "a missing layer": (_without_a_layer, r"layer\.1"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_folder_that_is_not_whole_is_refused(kind: str, tmp_path: Path) -> None:
    """One paragraph says what and what to do."""
    change, message = BROKEN[kind]
    folder = hf_folder(tmp_path / "hub")
    change(folder)
    with pytest.raises(UsageError, match=message):
        check(config_for(folder), NUM_TOKENS, None)


def test_what_the_refusal_says_to_do_works(enc: Enc) -> None:
    """`enc ckpt consolidate` makes model.safetensors of an older file."""
    folder = hf_folder(enc.folder / "hub")
    _old_format(folder)
    enc("ckpt", "consolidate", "hub", "--out", "hub/model.safetensors")
    check(config_for(folder), NUM_TOKENS, None)


def test_all_keys_that_differ_are_listed_with_what_to_write(tmp_path: Path) -> None:
    """Both values of each, and the overrides; buckets of a longer context among them."""
    folder = hf_folder(tmp_path / "hub")
    with pytest.raises(UsageError) as caught:
        check(config_for(folder, num_hidden_layers=3, max_position_embeddings=1024), None, None)
    for text in (
        "num_hidden_layers 3 (there 2)",
        "model.num_hidden_layers=2 model.relative_attention_num_buckets=32 model.relative_attention_max_distance=128",
    ):
        assert text in str(caught.value)
    with pytest.raises(UsageError, match=r"model\.max_position_embeddings=64"):
        check(config_for(folder, max_position_embeddings=32), None, None)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    """Of another size, or of the same size with a token elsewhere."""
    folder = hf_folder(tmp_path / "hub")
    with pytest.raises(UsageError, match=r"has 650 tokens.*are for 700"):
        check(config_for(folder), 650, None)
    other = Path(shutil.copytree(ANNOTATED / "tokenizer", tmp_path / "other"))
    content = json.loads((other / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    first, second = list(vocab)[100:102]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match="2 tokens have other ids"):
        check(config_for(folder), NUM_TOKENS, other)


def words(folder: Path, *more: str) -> list[str]:
    """Return words that launch two steps on the licence's text, from the weights of `hub`."""
    (folder / "text").mkdir(exist_ok=True)
    shutil.copy(Path(package.__file__).parent / "LICENSE", folder / "text" / "license.txt")
    (folder / "my.yaml").write_text(json.dumps({"model": {"type": "mpnet", **SIZES, "max_position_embeddings": 64}}))
    set_to = ["model.init_from=hub", "tokenizer.path=hub", "dataset.path=text", "dataset.max_seq_length=64",
              "trainer.output_dir=run", "trainer.max_steps=2", "trainer.save_steps=1", "trainer.use_cpu=true",
              "trainer.mixed_precision=no", "trainer.eval_strategy=no", "dataset.num_workers=0",
              "optimizer.lr=1e-12", "optimizer.weight_decay=0", "scheduler.name=constant"]  # fmt: skip
    return ["launch", "pretrain", "my.yaml", *set_to, *more]


def test_a_run_starts_from_a_folder_and_resumes_without_it(enc: Enc) -> None:
    """With a vanishing learning rate its export is the folder; on resume the folder is not looked at."""
    folder = hf_folder(enc.folder / "hub")
    done = enc(*words(enc.folder))
    assert "first weights" in done.stderr + done.stdout
    out = enc("ckpt", "export", "run", "--out", "out")
    assert "transformers' own" in out.stderr
    expected = load_file(folder / "model.safetensors")
    for name, tensor in load_file(enc.folder / "out" / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-8)
    shutil.rmtree(folder)
    again = enc("resume", "1", "--run", "run")
    assert "first weights" not in again.stderr + again.stdout
    assert enc.records("run")[2]["loss"] < 20


@pytest.mark.parametrize("problem", ["missing", "sizes", "trained tokenizer"])
def test_a_bad_start_is_refused_before_the_run_folder(enc: Enc, problem: str) -> None:
    """Exit code 2, one paragraph, and nothing is made, not even the token store."""
    hf_folder(enc.folder / "hub")
    change = {"missing": "model.init_from=gone", "sizes": "model.num_hidden_layers=3",
              "trained tokenizer": "tokenizer.train.vocab_size=700"}[problem]  # fmt: skip
    refused = enc(*words(enc.folder, change), code=2)
    assert refused.stderr.startswith("enc: ")
    assert len(refused.stderr.strip().splitlines()) == 1
    assert {path.name for path in enc.folder.iterdir()} == {"hub", "text", "my.yaml"}


def test_our_own_export_can_be_started_from(tmp_path: Path) -> None:
    """Its config tells what transformers' own cannot."""
    from enc.tools.export import export_model

    changes = {"normalize_before": True, "hidden_act": "silu", "relative_attention_num_buckets": 24}
    model, section = tiny_mpnet(**changes, relative_attention_max_distance=60)
    arguments = (model.state_dict(), section, ANNOTATED / "tokenizer", NUM_TOKENS, tmp_path / "own", {"name": "own"})
    folder = export_model(*arguments).folder
    same = RunConfig(model=section.model_copy(update={"init_from": str(folder)}))
    check(same, NUM_TOKENS, folder)
    other = section.model_copy(update={"init_from": str(folder), "normalize_before": False})
    with pytest.raises(UsageError, match=r"model\.normalize_before=true"):
        check(RunConfig(model=other), NUM_TOKENS, folder)
