"""MPNets in transformers: its own class where it computes the same, else the modelling file; the same numbers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_mpnet import ANNOTATED, BUCKETS, FIELDS, NUM_TOKENS, PRE_NORM, flat, padded, padding_first, texts, tiny_mpnet
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    MPNetConfig,
    MPNetForMaskedLM,
)

from enc.encoder.config.load import load_text
from enc.encoder.models import first_weights
from enc.encoder.models.build import init_weights
from enc.encoder.models.mpnet.config import MpnetConfig
from enc.encoder.models.mpnet.model import MpnetForMaskedLM
from enc.encoder.models.registry import parameters_of
from enc.tools.export import ExportResult, export_checkpoint, export_model
from enc.tools.import_run import hf_model_keys, import_run
from enc.tools.readers.detect import open_source

TOKENIZER = ANNOTATED / "tokenizer"
VARIANTS = {"pre-norm": PRE_NORM, "buckets": BUCKETS, "relu2": {"hidden_act": "relu2"}, "padding": {},
            "all": {**PRE_NORM, **BUCKETS, "hidden_act": "gelu_accurate"}}  # fmt: skip
REASONS = {"pre-norm": "never before", "buckets": "never 24 up to 60", "relu2": "never relu2", "padding": "never 0"}


pytestmark = pytest.mark.usefixtures("modules_cache")


def exported(tmp_path: Path, variant: str | None = None, **options) -> tuple[MpnetForMaskedLM, ExportResult]:
    model, config = tiny_mpnet(**VARIANTS.get(variant, {}))
    tokenizer = padding_first(tmp_path / "zero") if variant in ("padding", "all") else TOKENIZER
    arguments = (model.state_dict(), config, tokenizer, NUM_TOKENS, tmp_path / "out", {"name": "tiny"})
    return model, export_model(*arguments, **options)


@torch.no_grad()
def test_the_encoder_and_its_head_are_those_of_transformers() -> None:
    """With its weights, packed documents of uneven length get the numbers of transformers' padded batch."""
    torch.manual_seed(0)
    config = MPNetConfig(vocab_size=NUM_TOKENS, hidden_size=48, num_hidden_layers=4, num_attention_heads=4,
                         intermediate_size=96, max_position_embeddings=130, layer_norm_eps=1e-5,
                         initializer_range=0.1)  # fmt: skip
    theirs = MPNetForMaskedLM(config).eval()
    for parameter in theirs.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
    fields = dict(hidden_size=48, num_hidden_layers=4, intermediate_size=96, max_position_embeddings=128)
    ours = MpnetForMaskedLM(MpnetConfig(**{**FIELDS, **fields}), NUM_TOKENS).eval()
    for name, parameter in ours.named_parameters():
        tensor = theirs.state_dict()[name]
        parameter[: len(tensor)] = tensor
    documents = texts([128, 1, 57, 90])
    ids, mask = padded(documents, pad_id=1)
    hidden, logits = flat(ours, documents)
    found = theirs(ids, attention_mask=mask)
    keep = mask.bool()
    torch.testing.assert_close(hidden, theirs.mpnet(ids, attention_mask=mask)[0][keep], rtol=0, atol=5e-6)
    torch.testing.assert_close(logits, found.logits[keep], rtol=0, atol=5e-6 * logits.abs().max().item())


def test_an_ordinary_mpnet_becomes_transformers_own(tmp_path: Path) -> None:
    """It loads without any code of ours and without a missing tensor; sizes, rates and ids are in its config."""
    model, result = exported(tmp_path)
    assert "transformers' own MPNetForMaskedLM" in result.form
    assert not list(result.folder.glob("*.py"))
    loaded, info = AutoModelForMaskedLM.from_pretrained(result.folder, output_loading_info=True)
    assert isinstance(loaded, MPNetForMaskedLM)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    config = json.loads((result.folder / "config.json").read_text())
    expected = {"vocab_size": 700, "max_position_embeddings": 202, "layer_norm_eps": 1e-5, "hidden_dropout_prob": 0.1,
                "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}  # fmt: skip
    assert {name: config[name] for name in expected} == expected
    assert len(AutoTokenizer.from_pretrained(result.folder)) == 700
    documents = texts([5, 200, 33])
    ids, mask = padded(documents, pad_id=1)
    with torch.no_grad():
        logits = loaded.eval()(ids, attention_mask=mask).logits[mask.bool()]
    expected_logits = flat(model, documents)[1]
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-5 * expected_logits.abs().max().item())


@torch.no_grad()
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_transformers_lacks_comes_with_its_code(variant: str, side: str, tmp_path: Path) -> None:
    """Each document of a padded batch gets the flat model's states and logits; a row of padding stays finite."""
    model, result = exported(tmp_path, variant)
    assert "modeling_mpnet.py" in result.form
    assert REASONS.get(variant, "never 0") in result.form
    loaded, info = AutoModelForMaskedLM.from_pretrained(result.folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    documents = texts([5, 200, 1, 33], first_id=1)
    ids, mask = padded(documents, 0, side)
    ids, mask = torch.cat([ids, ids[:1]]), torch.cat([mask, torch.zeros_like(mask[:1])])
    found = loaded.eval()(ids, attention_mask=mask, output_hidden_states=True)
    hidden, logits = flat(model, documents)
    keep = mask.bool()
    torch.testing.assert_close(found.logits[keep], logits, rtol=0, atol=1e-5 * logits.abs().max().item())
    encoder = AutoModel.from_pretrained(result.folder, trust_remote_code=True).eval()
    states = encoder(ids, attention_mask=mask).last_hidden_state[keep]
    torch.testing.assert_close(states, hidden, rtol=0, atol=1e-5 * hidden.abs().max().item())
    assert len(found.hidden_states) == 4
    assert found.logits.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_own_class_would_be_wrong_there(variant: str) -> None:
    """The same weights in MPNetForMaskedLM give other logits, so refusing it is justified."""
    model, config = tiny_mpnet(**VARIANTS[variant])
    native = MPNetConfig(vocab_size=NUM_TOKENS, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
                         intermediate_size=64, max_position_embeddings=202, layer_norm_eps=1e-5,
                         hidden_act={"relu2": "relu2", "all": "gelu_pytorch_tanh"}.get(variant, "gelu"),
                         relative_attention_num_buckets=config.num_buckets)  # fmt: skip
    theirs = MPNetForMaskedLM(native).eval()
    if config.num_buckets < 32:  # it would look beyond the table
        theirs.mpnet.encoder.relative_attention_bias = torch.nn.Embedding(32, 4)
        theirs.mpnet.encoder.relative_attention_bias.weight.zero_()
    for name, parameter in theirs.named_parameters():
        tensor = model.state_dict()[name][: len(parameter)]
        parameter[: len(tensor)] = tensor
    (text,) = texts([150], first_id=1)
    text[3] = 1  # a word here; transformers takes it for padding
    expected = flat(model, [text])[1]
    difference = (theirs(text[None]).logits[0] - expected).abs().max() / expected.abs().max()
    assert difference > 1e-3


@pytest.mark.parametrize("labels", [torch.tensor([0, 2]), torch.eye(3)[:2]])
def test_a_classifier_trains(labels: torch.Tensor, tmp_path: Path) -> None:
    """The loss is finite and reaches the embedding and the table of the relative bias."""
    result = exported(tmp_path, "pre-norm")[1]
    classifier = AutoModelForSequenceClassification.from_pretrained(
        result.folder, trust_remote_code=True, num_labels=3
    ).train()
    output = classifier(torch.stack(texts([20, 20])), labels=labels)
    output.loss.backward()
    assert output.logits.shape == (2, 3)
    trained = (classifier.mpnet.embeddings.word_embeddings, classifier.mpnet.encoder.relative_attention_bias)
    assert all(module.weight.grad.isfinite().all() and module.weight.grad.any() for module in trained)


@torch.no_grad()
def test_sentence_transformers_finds_mean_pooling(tmp_path: Path) -> None:
    """The files that it reads name the modules, the pooling and the longest text, beside the same model."""
    model, result = exported(tmp_path, sentence_transformers=True)
    modules = json.loads((result.folder / "modules.json").read_text())
    assert [module["type"].rpartition(".")[2] for module in modules] == ["Transformer", "Pooling"]
    pooling = json.loads((result.folder / modules[1]["path"] / "config.json").read_text())
    assert pooling.pop("word_embedding_dimension") == 32
    assert [name for name, on in pooling.items() if on] == ["pooling_mode_mean_tokens"]
    assert json.loads((result.folder / "sentence_bert_config.json").read_text())["max_seq_length"] == 200
    tokenizer = AutoTokenizer.from_pretrained(result.folder)
    batch = tokenizer(["the license", "the work and the terms of the license"], padding=True, return_tensors="pt")
    states = AutoModel.from_pretrained(result.folder).eval()(**batch).last_hidden_state
    mask = batch["attention_mask"]
    for row in range(2):
        text = batch["input_ids"][row][mask[row] == 1]
        mean = states[row][mask[row] == 1].mean(0)
        torch.testing.assert_close(mean, flat(model, [text])[0].mean(0), rtol=0, atol=1e-5)
    assert f'SentenceTransformer("{result.folder}")' in (result.folder / "README.md").read_text()


@pytest.mark.parametrize("way", ["import", "init_from"])
@pytest.mark.parametrize("variant", [None, "pre-norm", "buckets", "all"])
def test_out_and_in_and_out_again_changes_no_byte(variant: str | None, way: str, tmp_path: Path) -> None:
    """Weights and config of the second export are those of the first, padded vocabulary rows come and go."""
    first = exported(tmp_path, variant)[1].folder
    keys = hf_model_keys(first)
    config = load_text("{}", "the default config", keys).config
    if way == "import":
        run = import_run(open_source(first), tmp_path / "run", config, None).run_dir
        second = export_checkpoint(run / "checkpoints" / "0", tmp_path / "again", "fp32").folder
    else:
        section = config.model.model_copy(update={"init_from": str(first)})
        model = MpnetForMaskedLM(section, NUM_TOKENS)
        init_weights(model, parameters_of(section), 5)
        first_weights.load(model, section, model.num_tokens)
        assert not model.head_weight[NUM_TOKENS:].any()
        arguments = (model.state_dict(), section, first, NUM_TOKENS, tmp_path / "again", {"name": "tiny"})
        second = export_model(*arguments).folder
    for name in ("model.safetensors", "config.json"):
        assert (second / name).read_bytes() == (first / name).read_bytes(), name
    assert load_file(second / "model.safetensors")["lm_head.bias"].shape == (NUM_TOKENS,)
