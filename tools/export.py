"""Turn trained NeoBERT weights into a folder that `transformers` loads, checked before it gets its name.

The folder holds ``config.json``, ``model.safetensors``, ``modeling_neobert.py`` (the model's code, self-contained), the
tokenizer's files and ``README.md`` (the model card). It is written beside its final place; only when transformers has
loaded it and its logits equal the trained model's is it renamed.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import logging as transformers_logging

from enc.encoder.config import NeoBertConfig
from enc.encoder.config_load import load_text
from enc.encoder.data.store import read_manifest
from enc.encoder.errors import RunError, UsageError
from enc.encoder.models import modeling_neobert
from enc.encoder.models.modeling_neobert import NeoBERTConfig, NeoBERTForMaskedLM
from enc.encoder.models.neobert import NeoBertForMaskedLM
from enc.tools.output import new_output, refuse_taken
from enc.tools.readers.source import damaged, numbers_in

TOLERANCE = 1e-5
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_VOCABULARY = ("model.encoder.weight", "decoder.weight", "decoder.bias")
_COPIED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "hidden_act",
    "rope",
    "rms_norm",
    "norm_eps",
    "dropout_prob",
    "embedding_init_range",
    "decoder_init_range",
    "classifier_init_range",
    "pad_token_id",
    "tie_word_embeddings",
    "decoder_bias",
    "final_logit_softcapping",
)
_METRICS = {
    "eval_loss": "Masked-token loss",
    "eval_accuracy": "Masked-token accuracy",
    "eval_perplexity": "Perplexity",
}
_AUTO_CLASSES = {
    "AutoConfig": "NeoBERTConfig",
    "AutoModel": "NeoBERTModel",
    "AutoModelForMaskedLM": "NeoBERTForMaskedLM",
    "AutoModelForSequenceClassification": "NeoBERTForSequenceClassification",
}


@dataclass(frozen=True)
class ExportResult:
    """What was written, and how well it agrees."""

    folder: Path
    num_parameters: int
    num_bytes: int
    max_difference: float
    """Largest difference of a logit between transformers and the trained model, relative to the largest logit."""


def export_checkpoint(folder: Path, out: Path | None, dtype: str) -> ExportResult:
    """Export a checkpoint folder to `out`, by default `<run>/hf/<step>`; `dtype` is "fp32" or "bf16".

    The model card's numbers are those of the run's metrics at the checkpoint's step. Raises as `export_model` does.
    """
    if dtype not in _DTYPES:
        raise UsageError(f"--dtype is {dtype!r}; allowed: {', '.join(_DTYPES)}.")
    _refuse_incomplete(folder)
    config = load_text((folder / "config.yaml").read_text(), str(folder / "config.yaml")).config
    counters = numbers_in(folder / "trainer_state.json", {"step": "step", "tokens": "tokens"})
    if len(counters) < 2:
        raise damaged(folder / "trainer_state.json", "step or tokens are missing")
    place = folder.resolve() if folder.is_symlink() else folder.absolute()
    run_dir, step = place.parent.parent, int(counters["step"])
    num_tokens = json.loads((folder / "tokenizer_info.json").read_text())["vocab_size"]
    card = {
        "name": f"{run_dir.name}-{step}",
        "dataset": _dataset_name(Path(config.dataset.path)),
        "row_length": config.row_length,
        "steps": step,
        "tokens": counters["tokens"],
        **_measured(run_dir / "metrics.jsonl", step),
    }
    if not isinstance(config.model, NeoBertConfig):
        raise UsageError(f"a {config.model.type} model has no export yet.")
    weights = load_file(folder / "model.safetensors")
    target = out or run_dir / "hf" / str(step)
    return export_model(weights, config.model, folder / "tokenizer", num_tokens, target, card, _DTYPES[dtype])


def _refuse_incomplete(folder: Path) -> None:
    names = ("config.yaml", "model.safetensors", "trainer_state.json", "tokenizer_info.json")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UsageError(f"{folder} has no {', '.join(missing)}, needed to export. Choose another checkpoint.")


def _dataset_name(store: Path) -> str | None:
    """Return what a token store was made from, without the folders of this machine; None when the store is gone."""
    if not (store / "manifest.json").is_file():
        return None
    source = read_manifest(store)["request"]["source"]
    return source["location"] if source["kind"] == "hub" else _local_name(source)


def _local_name(source: dict[str, Any]) -> str:
    return "python-docs" if source["kind"] == "python-docs" else Path(source["location"]).name


def _measured(metrics: Path, step: int) -> dict[str, Any]:
    """Return the last training loss up to a step, and the evaluation at it, as far as a run's metrics have them."""
    records = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
    losses = [r["loss"] for r in records if r["step"] <= step and r.get("loss") is not None]
    evaluations = [r for r in records if r["step"] == step and "eval_loss" in r]
    found = {label: evaluations[-1][key] for key, label in _METRICS.items()} if evaluations else {}
    return {"loss": losses[-1] if losses else None, "metrics": found}


def export_model(
    weights: dict[str, Tensor],
    model_config: NeoBertConfig,
    tokenizer_dir: Path,
    num_tokens: int,
    out: Path,
    card: dict[str, Any],
    dtype: torch.dtype = torch.float32,
) -> ExportResult:
    """Write a checked transformers folder.

    Args:
        weights: State dict of ``NeoBertForMaskedLM``, inert vocabulary rows included.
        model_config: The model section that the weights were trained with.
        tokenizer_dir: Folder whose files are the tokenizer.
        num_tokens: Tokens of the tokenizer; later rows of the vocabulary are left out.
        out: Folder to make; it may exist if it is empty.
        card: For the model card: ``name``; and where known ``steps``, ``tokens``, ``loss``, ``dataset``, ``license``,
            ``row_length`` (tokens of the longest text in training), ``metrics`` (name to value).
        dtype: Of the written weights, fp32 or bf16.

    Raises:
        UsageError: ``out`` is taken, the model is an nGPT, the dtype is another one, the weights do not fit the
            config, or there is no tokenizer. Nothing was written.
        RunError: Writing failed, or the written model disagrees with the trained one. Nothing is left behind.
    """
    refuse_taken(out)
    trained = _trained_model(weights, model_config, tokenizer_dir, num_tokens, dtype)
    tensors = {name: _exported(name, tensor, num_tokens, dtype) for name, tensor in trained.state_dict().items()}
    with new_output(out, sum(t.nbytes for t in tensors.values())) as partial:
        _write(partial, tensors, model_config, tokenizer_dir, num_tokens, card, dtype)
        difference = _check(partial, trained)
    num_bytes = sum(file.stat().st_size for file in out.iterdir())
    return ExportResult(out, sum(t.numel() for t in tensors.values()), num_bytes, difference)


def _trained_model(
    weights: dict[str, Tensor],
    config: NeoBertConfig,
    tokenizer_dir: Path,
    num_tokens: int,
    dtype: torch.dtype,
) -> NeoBertForMaskedLM:
    """Return the model with its weights rounded to the exported dtype, or say why nothing can be exported."""
    if config.ngpt:
        raise UsageError(
            "an nGPT model has no transformers counterpart here; only NeoBERT (model.ngpt: false) exports."
        )
    if dtype not in (torch.float32, torch.bfloat16):
        raise UsageError(f"weights export as float32 or bfloat16, not {dtype}.")
    if not (tokenizer_dir / "tokenizer.json").is_file():
        raise UsageError(f"{tokenizer_dir} holds no tokenizer.json. Give the tokenizer folder of the checkpoint.")
    model = NeoBertForMaskedLM(config, num_tokens)
    try:
        model.load_state_dict({name: tensor.to(dtype).float() for name, tensor in weights.items()})
    except RuntimeError as error:
        raise UsageError(f"the weights do not fit the model config and its {num_tokens} tokens: {error}") from None
    return model.eval()


def _exported(name: str, tensor: Tensor, num_tokens: int, dtype: torch.dtype) -> Tensor:
    return (tensor[:num_tokens] if name in _VOCABULARY else tensor).to(dtype).contiguous()


def _write(
    folder: Path,
    tensors: dict[str, Tensor],
    config: NeoBertConfig,
    tokenizer_dir: Path,
    num_tokens: int,
    card: dict[str, Any],
    dtype: torch.dtype,
) -> None:
    for file in tokenizer_dir.iterdir():
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(modeling_neobert.__file__, folder / "modeling_neobert.py")
    exported = hf_config(config, num_tokens)
    exported.dtype = str(dtype).removeprefix("torch.")
    exported.save_pretrained(folder)
    num_parameters = sum(t.numel() for t in tensors.values())
    (folder / "README.md").write_text(model_card(exported, num_parameters, card), encoding="utf-8")


def hf_config(config: NeoBertConfig, num_tokens: int) -> NeoBERTConfig:
    """Return the transformers config of a model, with the map that makes the Auto classes find its code."""
    fields = {name: getattr(config, name) for name in _COPIED}
    auto_map = {auto: f"modeling_neobert.{name}" for auto, name in _AUTO_CLASSES.items()}
    return NeoBERTConfig(
        vocab_size=num_tokens,
        architectures=["NeoBERTForMaskedLM"],
        auto_map=auto_map,
        **fields,
    )


def model_card(config: NeoBERTConfig, num_parameters: int, card: dict[str, Any]) -> str:
    """Render the README. Rows whose number is unknown are absent."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    architecture = {
        "Layers": config.num_hidden_layers,
        "Hidden size": config.hidden_size,
        "Attention heads": config.num_attention_heads,
        "Feed-forward": f"{config.hidden_act}, intermediate size {config.intermediate_size}",
        "Positions": f"{'rotary' if config.rope else 'learned'}, up to {config.max_position_embeddings}",
        "Norm": "RMSNorm" if config.rms_norm else "LayerNorm",
        "Vocabulary": f"{config.vocab_size:,} tokens, {'tied' if config.tie_word_embeddings else 'untied'} head",
    }
    facts = {
        "Dataset": card.get("dataset"),
        "Steps": _number(card.get("steps")),
        "Tokens": _number(card.get("tokens")),
        "Final training loss": _number(card.get("loss")),
    }
    return environment.get_template("model_card.md.j2").render(
        card={"license": None, "metrics": {}, "row_length": None, **card},
        config=config,
        architecture=architecture,
        training={label: value for label, value in facts.items() if value is not None},
        num_parameters=num_parameters,
        dtype=str(config.dtype).removeprefix("torch."),
    )


def _number(value: float | None) -> str | None:
    if value is None:
        return None
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _check(folder: Path, trained: NeoBertForMaskedLM) -> float:
    """Return the largest relative difference of a logit between the folder, as transformers loads it, and training."""
    transformers_logging.disable_progress_bar()
    exported = NeoBERTForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    longest = min(exported.config.max_position_embeddings, 512)
    lengths = sorted({1, min(7, longest), min(100, longest), longest})
    documents = [torch.randint(trained.num_tokens, (n,), generator=generator) for n in lengths]
    with torch.no_grad():
        expected = _packed_logits(trained, documents)
        found = torch.cat([exported(ids[None]).logits[0] for ids in documents])
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    if not difference <= TOLERANCE:
        raise RunError(
            f"The exported model's logits differ from the trained model's by {difference:.1e} of the largest logit, "
            f"more than {TOLERANCE:.0e}. Nothing was exported; please report this with the model section of the config."
        )
    return difference


def _packed_logits(model: NeoBertForMaskedLM, documents: list[Tensor]) -> Tensor:
    cu_seqlens = torch.tensor([0, *map(len, documents)]).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(len(ids)) for ids in documents])
    return model.logits(model(torch.cat(documents), cu_seqlens, positions))[:, : model.num_tokens]
