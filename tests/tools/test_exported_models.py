"""What fine-tuning and serving ask of an exported folder, of each form."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from exports import FORMS, exported
from torch import Tensor
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

pytestmark = pytest.mark.usefixtures("modules_cache")
OWN_CODE = FORMS[:2]
REMOTE = {"trust_remote_code": True}
PEFT_NAMES = ("classifier", "score", "qa_outputs")  # that PEFT saves beside an adapter without being told


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {form: exported(form, tmp_path_factory.mktemp("exports") / form) for form in FORMS}


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """A row of 9 tokens and one of 4, padded."""
    ids = torch.randint(5, 600, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[1, 4:], mask[1, 4:] = 1, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("form", FORMS)
def test_a_group_may_read_what_the_umask_lets_it(form: str, folders: dict[str, Path]) -> None:
    """Weights too, which are written by another hand than the rest."""
    assert {oct(path.stat().st_mode & 0o777) for path in folders[form].iterdir()} == {"0o640"}


@pytest.mark.parametrize("form", FORMS)
def test_the_tokenizer_gives_what_the_model_takes(form: str, folders: dict[str, Path]) -> None:
    """In writing: transformers 4 gives token types too where it is not told."""
    settings = json.loads((folders[form] / "tokenizer_config.json").read_text())
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    assert list(AutoTokenizer.from_pretrained(folders[form])("a")) == ["input_ids", "attention_mask"]


@pytest.mark.parametrize("form", OWN_CODE)
def test_exported_code_does_not_need_enc(form: str, folders: dict[str, Path]) -> None:
    for path in folders[form].glob("*.py"):
        assert "enc." not in path.read_text()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_heads_learn_and_their_new_weights_have_a_name_that_peft_knows(
    form: str, head: str, folders: dict[str, Path], batch: dict[str, Tensor]
) -> None:
    """A loss goes down in a few steps, and all that is new lies below one of PEFT's names."""
    auto: Any = getattr(transformers, f"AutoModelFor{head}")
    torch.manual_seed(0)
    sizes = {} if head == "QuestionAnswering" else {"num_labels": 3}
    model, info = auto.from_pretrained(folders[form], output_loading_info=True, **sizes, **REMOTE)
    assert {name.partition(".")[0] for name in info["missing_keys"]} <= set(PEFT_NAMES)
    tokens = torch.tensor([[0, 1, 2, 0, 1, 2, 0, 1, -100], [2, 2, 1, 1, *[-100] * 5]])
    labels = {
        "SequenceClassification": {"labels": torch.tensor([0, 2])},
        "TokenClassification": {"labels": tokens},
        "QuestionAnswering": {"start_positions": torch.tensor([3, 1]), "end_positions": torch.tensor([5, 700])},
    }[head]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = model.eval()(**batch, **labels).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("form", OWN_CODE)
def test_a_choice_gets_the_score_of_its_text(form: str, folders: dict[str, Path], batch: dict[str, Tensor]) -> None:
    """The scores of C texts are those of each alone; the loss is that of the right one."""
    model = transformers.AutoModelForMultipleChoice.from_pretrained(folders[form], **REMOTE).eval()
    choices = {name: tensor[None] for name, tensor in batch.items()}  # (1, 2, S)
    output = model(**choices, labels=torch.tensor([1]))
    alone = [model(**{name: tensor[:, c : c + 1] for name, tensor in choices.items()}).logits[0, 0] for c in range(2)]
    torch.testing.assert_close(output.logits[0], torch.stack(alone))
    torch.testing.assert_close(output.loss, -output.logits.log_softmax(-1)[0, 1])


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_a_config_that_wants_tuples_gets_them(form: str, folders: dict[str, Path], batch: dict[str, Tensor]) -> None:
    expected = AutoModelForMaskedLM.from_pretrained(folders[form], **REMOTE).eval()(**batch).logits
    found = AutoModelForMaskedLM.from_pretrained(folders[form], return_dict=False, **REMOTE).eval()(**batch)
    assert isinstance(found, tuple)
    assert torch.equal(found[0], expected)


@torch.no_grad()
@pytest.mark.parametrize("form", OWN_CODE)
def test_eager_attention_shows_its_weights(form: str, folders: dict[str, Path], batch: dict[str, Tensor]) -> None:
    """They sum to one over the tokens, are nothing on padding, and the logits are those of the fast attention."""
    fast = AutoModelForMaskedLM.from_pretrained(folders[form], **REMOTE).eval()
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        fast(**batch, output_attentions=True)
    model = AutoModelForMaskedLM.from_pretrained(folders[form], attn_implementation="eager", **REMOTE).eval()
    output = model(**batch, output_attentions=True)
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, 4, 9, 9)] * 3
    for weights in output.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 9))
        assert not weights[1, :, :, 4:].any()
    expected = fast(**batch).logits
    torch.testing.assert_close(output.logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert model(**batch).attentions is None


def _flash(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
           causal: bool = False) -> Tensor:  # fmt: skip
    """Do what flash_attn_func does, (B, S, H, D)."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, is_causal=causal, scale=softmax_scale).transpose(1, 2)


def _recording(rows: list[int]) -> Callable[..., Tensor]:
    def varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
               max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None,
               causal: bool = False) -> Tensor:  # fmt: skip
        """Do what flash_attn_varlen_func does, (T, H, D), and note T."""
        rows.append(len(q))
        bounds = cu_seqlens_q.tolist()
        spans = [slice(a, b) for a, b in pairwise(bounds)]
        return torch.cat([_flash(*(x[span][None] for x in (q, k, v)), 0.0, softmax_scale, causal)[0] for span in spans])

    return varlen


@torch.no_grad()
def test_flash_attention_computes_no_padding(
    folders: dict[str, Path], batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers gives its kernels the 13 tokens of a batch of 18 places; the logits are those without it."""
    from transformers import modeling_flash_attention_utils as flash

    rows: list[int] = []
    kernels = (_flash, _recording(rows), None, flash._pad_input, flash._unpad_input)
    monkeypatch.setattr(flash, "_lazy_imports", lambda *args, **options: kernels)
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    model = AutoModelForMaskedLM.from_pretrained(folders["neobert"], **REMOTE).eval()
    padded, whole = model(**batch).logits, model(batch["input_ids"]).logits
    model.config._attn_implementation = "flash_attention_2"  # past the question whether its package is here
    keep = batch["attention_mask"].bool()
    torch.testing.assert_close(model(**batch).logits[keep], padded[keep], rtol=1e-4, atol=1e-5)
    assert rows == [13] * 3
    torch.testing.assert_close(model(batch["input_ids"]).logits, whole, rtol=1e-4, atol=1e-5)
    assert rows == [13] * 3


def test_flash_attention_is_refused_where_a_bias_has_no_place(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="does not support Flash Attention"):
        AutoModel.from_pretrained(folders["mpnet"], attn_implementation="flash_attention_2", **REMOTE)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("form", OWN_CODE)
def test_gradient_checkpointing_changes_no_gradient(
    form: str, folders: dict[str, Path], batch: dict[str, Tensor]
) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = AutoModelForSequenceClassification.from_pretrained(folders[form], num_labels=2, **REMOTE).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(1)
        for parameter in model.classifier.parameters():
            torch.nn.init.normal_(parameter)
        model(**batch, labels=torch.tensor([0, 1])).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("form", OWN_CODE)
def test_nothing_sums_bools_for_onnx(
    form: str, folders: dict[str, Path], batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX sums numbers only, so a trace that sums bools makes a file that no runtime loads."""
    summed: list[torch.dtype] = []
    cumsum = torch.Tensor.cumsum
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda x, dim: (summed.append(x.dtype), cumsum(x, dim))[1])
    AutoModel.from_pretrained(folders[form], **REMOTE).eval()(**batch)
    assert summed == [torch.int64]


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.parametrize("form", OWN_CODE)
def test_torch_export_takes_it_with_gradients_on(form: str, folders: dict[str, Path], batch: dict[str, Tensor]) -> None:
    """The program taken apart for ONNX, made while gradients are on, computes the same for another shape."""
    model = AutoModelForMaskedLM.from_pretrained(folders[form], **REMOTE).eval()
    rows, places = torch.export.Dim("rows"), torch.export.Dim("places", max=60)
    shapes = {"input_ids": {0: rows, 1: places}, "attention_mask": {0: rows, 1: places}}
    with torch.enable_grad():
        program = torch.export.export(model, (), batch, dynamic_shapes=shapes).run_decompositions()
    longer = {name: tensor.repeat(2, 3) for name, tensor in batch.items()}
    torch.testing.assert_close(program.module()(**longer).logits, model(**longer).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_text_beyond_the_positions_is_refused_and_padding_is_not(folders: dict[str, Path]) -> None:
    """An MPNet of 200 positions takes a row of 220 places of which 200 are text, not one of 201 tokens."""
    model = AutoModel.from_pretrained(folders["mpnet"], **REMOTE).eval()
    ids, mask = torch.full((1, 220), 7), torch.arange(220)[None] < 200
    torch.testing.assert_close(model(ids, mask)[0][:, :200], model(ids[:, :200])[0])
    with pytest.raises(ValueError, match=r"201 tokens.*positions for 200.*truncation=True"):
        model(ids[:, :201])
