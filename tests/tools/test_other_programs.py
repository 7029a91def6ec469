"""Exports in programs of other versions and makes: the oldest transformers that is meant, ONNX, PEFT."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from exports import FORMS, exported
from transformers import AutoModelForMaskedLM, AutoTokenizer

pytestmark = [pytest.mark.usefixtures("modules_cache"), pytest.mark.slow, pytest.mark.processes]
TEXTS = ["the license of the work", "the terms"]
REQUESTS = ("requests", "urllib3", "idna", "certifi", "charset-normalizer")
BEGIN = """
import sys, torch
from transformers import AutoTokenizer
import transformers
folder, out = sys.argv[1:]
remote = {"trust_remote_code": True}
tokenizer = AutoTokenizer.from_pretrained(folder, **remote)
batch = tokenizer(["the license of the work", "the terms"], padding=True, return_tensors="pt")
"""
OLDEST = (
    BEGIN
    + """
for head in ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MaskedLM"):
    model = getattr(transformers, f"AutoModelFor{head}").from_pretrained(folder, **remote).eval()
    output = model(**batch)
transformers.pipeline("fill-mask", model=folder, **remote)(f"the {tokenizer.mask_token}")
model.save_pretrained(out + ".saved")
again = transformers.AutoModelForMaskedLM.from_pretrained(out + ".saved", **remote).eval()
assert torch.equal(again(**batch).logits, output.logits)
torch.save({"version": transformers.__version__, "logits": output.logits, **batch}, out)
"""
)
ONNX = (
    BEGIN
    + """
import onnxruntime
model = transformers.AutoModelForMaskedLM.from_pretrained(folder, return_dict=False, **remote).eval()
names, given = ["input_ids", "attention_mask"], (batch["input_ids"], batch["attention_mask"])
rows, places = torch.export.Dim("rows"), torch.export.Dim("places", max=60)
dynamic = {name: {0: rows, 1: places} for name in names}
torch.onnx.export(model, (), out + "d", kwargs=dict(zip(names, given)), dynamo=True, dynamic_shapes=dynamic)
axes = {name: {0: "rows", 1: "places"} for name in names}
torch.onnx.export(model, given, out + "t", input_names=names, dynamic_axes=axes, dynamo=False, opset_version=17)
longer = {name: batch[name].repeat(2, 3) for name in names}
expected = model(**longer)[0]
for file in (out + "d", out + "t"):
    session = onnxruntime.InferenceSession(file)
    found = torch.tensor(session.run(None, {name: longer[name].numpy() for name in names})[0])
    keep = longer["attention_mask"].bool()
    torch.testing.assert_close(found[keep], expected[keep], rtol=0, atol=1e-5 * expected.abs().max().item())
"""
)
PEFT = (
    BEGIN
    + """
from peft import LoraConfig, PeftModel, get_peft_model
load = lambda: transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, **remote)
model = get_peft_model(load(), LoraConfig(task_type="SEQ_CLS", target_modules="all-linear"))
model.eval().save_pretrained(out)
torch.manual_seed(1)
assert torch.equal(PeftModel.from_pretrained(load(), out).eval()(**batch).logits, model(**batch).logits)
"""
)


def installed(folder: Path, *packages: str) -> Path:
    """Install packages, and not what they need, into a folder."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), *packages]
    subprocess.run(command, check=True, timeout=600)
    return folder


def ran(program: str, form: str, packages: Path, tmp_path: Path) -> Path:
    """Run a program on an export of a form, with packages before those that are there; return where it writes."""
    folder, out = exported(form, tmp_path / form), tmp_path / "out"
    environment = {"PYTHONPATH": str(packages), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-c", program, str(folder), str(out)]
    done = subprocess.run(words, env=environment, cwd=tmp_path, timeout=300, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def oldest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    packages = ("transformers==4.57.6", "huggingface_hub==0.36.0", "tokenizers==0.22.1", *REQUESTS)
    return installed(tmp_path_factory.mktemp("oldest"), *packages)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_the_oldest_transformers_computes_the_same(form: str, oldest: Path, tmp_path: Path) -> None:
    """All heads load, the pipeline runs, saving keeps the model, and the logits are those of the version here."""
    found = torch.load(ran(OLDEST, form, oldest, tmp_path))
    assert found["version"] == "4.57.6"
    batch = AutoTokenizer.from_pretrained(tmp_path / form)(TEXTS, padding=True, return_tensors="pt")
    assert all(torch.equal(found[name], batch[name]) for name in batch)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / form, trust_remote_code=True).eval()
    torch.testing.assert_close(found["logits"], model(**batch).logits)


@pytest.mark.parametrize("form", FORMS[:2])
def test_onnx_computes_the_same_both_ways(form: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    """Traced or by torch.export, for a batch of another shape."""
    names = ("onnx", "onnxruntime", "onnxscript", "onnx-ir", "ml_dtypes", "flatbuffers", "protobuf")
    ran(ONNX, form, installed(tmp_path_factory.mktemp("onnx"), *names), tmp_path)


@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_brings_its_head(form: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    """A classifier with LoRA gives the same scores after it was saved and loaded by PEFT."""
    ran(PEFT, form, installed(tmp_path_factory.mktemp("peft"), "peft"), tmp_path)
