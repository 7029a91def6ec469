"""Exported folders: transformers gives the trained model's logits, and nothing half-done is ever left."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from enc.encoder.errors import RunError, UsageError
from enc.encoder.models.build import init_weights
from enc.encoder.models.neobert.config import NeoBertConfig
from enc.encoder.models.neobert.model import NeoBertForMaskedLM
from enc.encoder.models.registry import parameters_of
from enc.tools import export
from enc.tools.export import export_model

NUM_TOKENS = 300
LEARNED = {"hidden_act": "gelu", "rms_norm": False, "rope": False}
UNTIED = {"tie_word_embeddings": False}
VARIANTS = {"swiglu": {}, "untied": UNTIED, "bias": {**UNTIED, "decoder_bias": True}, "gelu-layernorm-learned": LEARNED,
            "softcap": {"final_logit_softcapping": 3.0}}  # fmt: skip
CARD = {"name": "tiny", "steps": 12_000, "tokens": 3_000_000, "loss": 2.5, "metrics": {"eval loss": 2.4321}}


pytestmark = pytest.mark.usefixtures("modules_cache")


@pytest.fixture(autouse=True)
def _words_of_transformers(monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # for caplog


@pytest.fixture
def tokenizer_dir(tmp_path) -> Path:
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[MASK]": 2} | {f"w{i}": i for i in range(3, NUM_TOKENS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", mask_token="[MASK]")
    fast.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def trained(**changes) -> tuple[NeoBertForMaskedLM, NeoBertConfig]:
    fields = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=100, vocab_size=384)
    ranges = dict(max_position_embeddings=64, decoder_init_range=0.2, embedding_init_range=0.5)
    config = NeoBertConfig(**{**fields, **ranges, **changes})
    model = NeoBertForMaskedLM(config, NUM_TOKENS)
    init_weights(model, parameters_of(config), seed=0)
    if model.head_bias is not None:
        torch.nn.init.normal_(model.head_bias, generator=torch.Generator().manual_seed(1))
    return model.eval(), config


def flat_logits(model: NeoBertForMaskedLM, ids: torch.Tensor) -> torch.Tensor:
    bounds = torch.tensor([0, len(ids)], dtype=torch.int32)
    return model.logits(model(ids, bounds, torch.arange(len(ids))))[:, :NUM_TOKENS]


def documents(lengths: list[int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, NUM_TOKENS, (n,), generator=generator) for n in lengths]


def load(auto, folder: Path, caplog, **options):
    """Load offline; a word of transformers about a missing or unexpected key fails the test."""
    with caplog.at_level(logging.WARNING):
        model, info = auto.from_pretrained(folder, trust_remote_code=True, output_loading_info=True, **options)
    assert not caplog.records, caplog.text
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_padded_transformers_batches_meet_the_flat_model(variant, padding_side, tokenizer_dir, tmp_path, caplog):
    """Each document of a padded batch gets the flat model's logits, on either side, with an int or a bool mask."""
    model, config = trained(**VARIANTS[variant])
    result = export_model(model.state_dict(), config, tokenizer_dir, NUM_TOKENS, tmp_path / "out", CARD)
    assert result.max_difference <= 1e-5
    loaded = load(AutoModelForMaskedLM, result.folder, caplog)
    texts = documents([5, 64, 1, 33])
    ids, mask = torch.zeros(4, 64, dtype=torch.long), torch.zeros(4, 64, dtype=torch.long)
    for row, text in enumerate(texts):
        place = slice(0, len(text)) if padding_side == "right" else slice(64 - len(text), 64)
        ids[row, place], mask[row, place] = text, 1
    logits = loaded(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(logits, loaded(input_ids=ids, attention_mask=mask.bool()).logits)
    for row, text in enumerate(texts):
        expected = flat_logits(model, text)
        torch.testing.assert_close(logits[row][mask[row] == 1], expected, atol=1e-5 * expected.abs().max(), rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_auto_model_gives_the_hidden_states(variant, tokenizer_dir, tmp_path, caplog):
    """AutoModel loads without a word; embeddings, positions and all hidden states can be had."""
    model, config = trained(**VARIANTS[variant])
    folder = export_model(model.state_dict(), config, tokenizer_dir, NUM_TOKENS, tmp_path / "out", CARD).folder
    loaded = load(AutoModel, folder, caplog)
    (ids,) = documents([40])
    expected = model(ids, torch.tensor([0, 40], dtype=torch.int32), torch.arange(40))
    output = loaded(ids[None], output_hidden_states=True)
    torch.testing.assert_close(output.last_hidden_state[0], expected, atol=1e-5, rtol=1e-4)
    assert len(output.hidden_states) == 4
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    embedded = loaded(inputs_embeds=loaded.get_input_embeddings()(ids[None]), position_ids=torch.arange(40)[None])
    assert torch.equal(embedded.last_hidden_state, output.last_hidden_state)
    assert torch.equal(loaded(ids[None], return_dict=False)[0], output.last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_of_padding_is_finite_and_harmless(variant, tokenizer_dir, tmp_path, caplog):
    """No NaN, and the other rows keep their values."""
    model, config = trained(**VARIANTS[variant])
    folder = export_model(model.state_dict(), config, tokenizer_dir, NUM_TOKENS, tmp_path / "out", CARD).folder
    loaded = load(AutoModelForMaskedLM, folder, caplog)
    ids = torch.stack(documents([20, 20]))
    logits = loaded(ids, attention_mask=torch.tensor([[1] * 20, [0] * 20])).logits
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[0], loaded(ids[:1]).logits[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_round_trip_keeps_tie_and_values(variant, tokenizer_dir, tmp_path, caplog):
    """Saved by transformers and loaded again, head and embedding are one tensor exactly when tied."""
    model, config = trained(**VARIANTS[variant])
    folder = export_model(model.state_dict(), config, tokenizer_dir, NUM_TOKENS, tmp_path / "out", CARD).folder
    first = load(AutoModelForMaskedLM, folder, caplog)
    first.save_pretrained(tmp_path / "again")
    second = load(AutoModelForMaskedLM, tmp_path / "again", caplog)
    for loaded in (first, second):
        assert (loaded.decoder.weight is loaded.model.encoder.weight) == config.tie_word_embeddings
    ids = documents([30])[0][None]
    assert torch.equal(first(ids).logits, second(ids).logits)
    assert load_file(folder / "model.safetensors").keys() == load_file(tmp_path / "again/model.safetensors").keys()
    loss = second(ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite()
    assert second.model.encoder.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("labels", "num_labels"), [(torch.tensor([0, 2]), 3), (torch.tensor([0.5, 1.0]), 1), (torch.eye(3)[:2], 3)]
)
def test_sequence_classification_trains(labels, num_labels, tokenizer_dir, tmp_path):
    """Classes, regression and multi-label: the loss is finite and reaches encoder and classifier."""
    model, config = trained()
    folder = export_model(model.state_dict(), config, tokenizer_dir, NUM_TOKENS, tmp_path / "out", CARD).folder
    classifier = AutoModelForSequenceClassification.from_pretrained(
        folder, trust_remote_code=True, num_labels=num_labels
    )
    encoder = model.model.encoder.weight[:NUM_TOKENS]
    assert torch.equal(classifier.model.encoder.weight, encoder)
    assert 0.01 < classifier.classifier.dense.weight.std() < 0.03
    output = classifier(torch.stack(documents([20, 20])), labels=labels)
    output.loss.backward()
    assert output.logits.shape == (2, num_labels)
    assert all(
        p.grad.isfinite().all() and p.grad.any()
        for p in (classifier.model.encoder.weight, classifier.classifier.dense.weight)
    )


def test_bf16_halves_the_weights_and_meets_them(tokenizer_dir, tmp_path, caplog):
    """The check runs against the rounded weights; transformers loads bf16."""
    model, config = trained()
    result = export_model(
        model.state_dict(), config, tokenizer_dir, NUM_TOKENS, tmp_path / "out", CARD, dtype=torch.bfloat16
    )
    assert {t.dtype for t in load_file(result.folder / "model.safetensors").values()} == {torch.bfloat16}
    assert load(AutoModelForMaskedLM, result.folder, caplog, dtype="auto").dtype == torch.bfloat16


def test_the_folder_is_whole(tokenizer_dir, tmp_path):
    """Inert rows are gone, the tokenizer loads, the card has the numbers and no licence that nobody gave."""
    model, config = trained()
    result = export_model(model.state_dict(), config, tokenizer_dir, NUM_TOKENS, tmp_path / "a/b", CARD)
    assert load_file(result.folder / "model.safetensors")["model.encoder.weight"].shape == (NUM_TOKENS, 48)
    assert result.num_bytes > result.num_parameters * 4
    assert AutoTokenizer.from_pretrained(result.folder)("w7 w9")["input_ids"] == [7, 9]
    card = (result.folder / "README.md").read_text()
    for text in ("# tiny", "| Steps | 12,000 |", "| Tokens | 3,000,000 |", "| eval loss | 2.432 |", "300 tokens, tied"):
        assert text in card
    assert "license" not in card
    assert "Dataset" not in card
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["b"]


def test_the_exported_tokenizer_gives_the_rows_that_were_trained_on(tokenizer_dir, tmp_path):
    """A run may have been started with a tokenizer that writes no [CLS] and [SEP] by itself; its export does."""
    names = ["[PAD]", "[UNK]", "[MASK]", "[CLS]", "[SEP]", "w5", "w6", "w7"]
    vocabulary = {name: i for i, name in enumerate(names)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]")).save(str(tokenizer_dir / "tokenizer.json"))
    model, config = trained()
    result = export_model(model.state_dict(), config, tokenizer_dir, NUM_TOKENS, tmp_path / "out", CARD)
    assert AutoTokenizer.from_pretrained(result.folder)("w7")["input_ids"] == [3, 7, 4]


def test_a_wrong_export_leaves_nothing(tokenizer_dir, tmp_path, monkeypatch):
    """If the logits disagree, the folder never appears."""
    model, config = trained()
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(RunError, match="differ from the trained model's"):
        export_model(model.state_dict(), config, tokenizer_dir, NUM_TOKENS, tmp_path / "out/x", CARD)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("problem", ["taken", "ngpt", "dtype", "tokenizer", "weights"])
def test_requests_that_cannot_be_met_write_nothing(problem, tokenizer_dir, tmp_path):
    """Each is refused in a sentence before anything is written."""
    model, config = trained(ngpt=problem == "ngpt")
    weights, out, dtype = model.state_dict(), tmp_path / "out", torch.float32
    if problem == "taken":
        out.mkdir()
        (out / "precious").touch()
    elif problem == "dtype":
        dtype = torch.float16
    elif problem == "tokenizer":
        tokenizer_dir = tmp_path
    elif problem == "weights":
        weights.pop("model.layer_norm.weight")
    before = sorted(tmp_path.rglob("*"))
    match = {"taken": "not empty", "ngpt": "nGPT", "dtype": "float16", "tokenizer": "tokenizer.json"}
    with pytest.raises(UsageError, match=match.get(problem, "do not fit")):
        export_model(weights, config, tokenizer_dir, NUM_TOKENS, out, CARD, dtype=dtype)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_with_the_name_of_a_temporary_one_stays(tokenizer_dir, tmp_path):
    """Even when what is exported lies in it."""
    model, config = trained()
    tokenizer_dir.rename(tmp_path / ".out.tmp")
    export_model(model.state_dict(), config, tmp_path / ".out.tmp", NUM_TOKENS, tmp_path / "out", CARD)
    assert (tmp_path / ".out.tmp" / "tokenizer.json").is_file()
