"""Turn trained weights into a folder that `transformers` loads, checked before it gets its name.

The folder holds ``config.json``, ``model.safetensors``, the tokenizer's files, ``README.md`` (the model card) and, for
what transformers does not know, the model's code, self-contained. It is written beside its final place; only when
transformers has loaded it and its logits equal the trained model's is it renamed. What differs between architectures
is in ``tools/models``.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import logging as transformers_logging

from enc.encoder.checkpoints.tensor_file import TensorSpec, file_order, write_tensors
from enc.encoder.config.load import load_text
from enc.encoder.data.tokenizer import mend_saved
from enc.encoder.errors import RunError, UsageError
from enc.encoder.files import read_json, write_json
from enc.encoder.models.config import ModelConfig
from enc.encoder.tasks import TASKS
from enc.tools.model_card import card_of_run, model_card, place_to_load
from enc.tools.models.export_target import ExportTarget
from enc.tools.models.registry import tools_of
from enc.tools.output import new_output, refuse_dtype, replaces_export
from enc.tools.readers.source import damaged, numbers_in
from enc.tools.sentence_files import write_sentence_files

TOLERANCE = 1e-5
_CODE_ROOM = "enc.encoder.models."  # of modelling files; beside weights they lie in one folder
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ExportResult:
    """What was written, and how well it agrees."""

    folder: Path
    num_parameters: int
    num_bytes: int
    max_difference: float
    """Largest difference of a logit between transformers and the trained model, relative to the largest logit."""
    form: str
    """A sentence: as which model of transformers it was written, and why."""


def export_checkpoint(
    folder: Path,
    out: Path | None,
    dtype: str,
    sentence_transformers: bool = False,
    force: bool = False,
    repository: str | None = None,
) -> ExportResult:
    """Export a checkpoint folder to `out`, by default `<run>/hf/<step>`; `dtype` is "fp32" or "bf16".

    The model card has what the run's files tell up to the checkpoint's step. The rest is that of `export_model`, which
    see for what is raised.
    """
    refuse_dtype(dtype)
    _refuse_incomplete(folder)
    config = load_text((folder / "config.yaml").read_text(), str(folder / "config.yaml")).config
    task = TASKS[config.task]
    if not task.exports:
        raise UsageError(f"{folder} is a checkpoint of {task.title}, which has no form in transformers.")
    counters = numbers_in(folder / "trainer_state.json", {"step": "step", "tokens": "tokens"})
    if len(counters) < 2:
        raise damaged(folder / "trainer_state.json", "step or tokens are missing")
    place = folder.resolve() if folder.is_symlink() else folder.absolute()
    run_dir, step = place.parent.parent, int(counters["step"])
    num_tokens = read_json(folder / "tokenizer_info.json")["vocab_size"]
    card = card_of_run(run_dir, config, step, int(counters["tokens"]))
    return export_model(
        load_file(folder / "model.safetensors"), config.model, folder / "tokenizer", num_tokens,
        out or run_dir / "hf" / str(step), card, _DTYPES[dtype], sentence_transformers, force, repository,
    )  # fmt: skip


def _refuse_incomplete(folder: Path) -> None:
    names = ("config.yaml", "model.safetensors", "trainer_state.json", "tokenizer_info.json")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UsageError(f"{folder} has no {', '.join(missing)}, needed to export. Choose another checkpoint.")


def export_model(
    weights: dict[str, Tensor],
    model_config: ModelConfig,
    tokenizer_dir: Path,
    num_tokens: int,
    out: Path,
    card: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    sentence_transformers: bool = False,
    force: bool = False,
    repository: str | None = None,
) -> ExportResult:
    """Write a checked transformers folder.

    Args:
        weights: State dict of the training model, inert vocabulary rows included.
        model_config: The model section that the weights were trained with.
        tokenizer_dir: Folder whose files are the tokenizer.
        num_tokens: Tokens of the tokenizer; later rows of the vocabulary are left out.
        out: Folder to make; it may exist if it is empty.
        card: For the model card: ``name``; and where known ``steps``, ``tokens``, ``loss``, ``dataset``, ``license``,
            ``row_length`` (tokens of the longest text in training), ``metrics`` (name to value), and what
            `card_of_run` has besides.
        dtype: Of the written weights, fp32 or bf16.
        sentence_transformers: Write the files of sentence-transformers too, with mean pooling.
        force: Replace an export that is there.
        repository: Where it will be on the hub, for the card.

    Raises:
        UsageError: ``out`` is taken, the model is an nGPT, the dtype is another one, the weights do not fit the
            config, or there is no tokenizer. Nothing was written.
        RunError: Writing failed, or the written model disagrees with the trained one. Nothing is left behind.
    """
    replaced = replaces_export(out, force)
    if dtype not in (torch.float32, torch.bfloat16):
        raise UsageError(f"weights export as float32 or bfloat16, not {dtype}.")
    if not (tokenizer_dir / "tokenizer.json").is_file():
        raise UsageError(f"{tokenizer_dir} holds no tokenizer.json. Give the tokenizer folder of the checkpoint.")
    target = tools_of(model_config).export_target(model_config, tokenizer_dir, num_tokens)
    trained = _filled(target.trained, weights, dtype)
    tensors = {name: _exported(name, tensor, target, dtype) for name, tensor in trained.state_dict().items()}
    target.config.dtype = str(dtype).removeprefix("torch.")
    with new_output(out, sum(t.nbytes for t in tensors.values()), replaced=replaced) as partial:
        _write(partial, tensors, target, tokenizer_dir)
        if sentence_transformers:
            seen = min(card.get("row_length") or target.longest, target.longest)  # further positions are untrained
            write_sentence_files(partial, model_config.hidden_size, seen)
        num_parameters = sum(t.numel() for t in tensors.values())
        text = model_card(target, num_parameters, card, place_to_load(out, repository), sentence_transformers)
        (partial / "README.md").write_text(text, encoding="utf-8")
        difference = _check(partial, target)
    num_bytes = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    return ExportResult(out, num_parameters, num_bytes, difference, target.form)


def _filled(model: Any, weights: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """Fill the training model with its weights, rounded to the exported dtype."""
    try:
        model.load_state_dict({name: tensor.to(dtype).float() for name, tensor in weights.items()})
    except RuntimeError as error:
        raise UsageError(
            f"the weights do not fit the model config and its {model.num_tokens} tokens: {error}"
        ) from None
    return model.eval()


def _exported(name: str, tensor: Tensor, target: ExportTarget, dtype: torch.dtype) -> Tensor:
    kept = tensor[: target.trained.num_tokens] if name in target.vocabulary else tensor
    return kept.to(dtype).contiguous()


def _write(folder: Path, tensors: dict[str, Tensor], target: ExportTarget, tokenizer_dir: Path) -> None:
    for file in tokenizer_dir.iterdir():
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    mend_saved(folder)
    _tell_tokenizer(folder / "tokenizer_config.json", target.longest)
    specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
    write_tensors(folder / "model.safetensors", specs, (tensors[name] for name in file_order(specs)))
    for file in target.code:
        (folder / file.name).write_text(file.read_text().replace(_CODE_ROOM, "."), encoding="utf-8")
    target.config.save_pretrained(folder)


def _tell_tokenizer(path: Path, longest: int) -> None:
    """Let the tokenizer cut at what the model has positions for, and give what the model takes.

    Versions of transformers differ in what they give by default.
    """
    settings = read_json(path) if path.is_file() else {}
    settings |= {"model_max_length": longest, "model_input_names": ["input_ids", "attention_mask"]}
    write_json(path, settings, indent=2)


def _check(folder: Path, target: ExportTarget) -> float:
    """Return the largest relative difference of a logit between the folder, as transformers loads it, and training."""
    transformers_logging.disable_progress_bar()
    exported: Any = target.model_class.from_pretrained(folder, dtype=torch.float32).eval()
    documents = _documents(target)
    with torch.no_grad():
        expected = _packed_logits(target.trained, documents)
        found = torch.cat([exported(ids[None]).logits[0] for ids in documents])
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    if not difference <= TOLERANCE:
        raise RunError(
            f"The exported model's logits differ from the trained model's by {difference:.1e} of the largest logit, "
            f"more than {TOLERANCE:.0e}. Nothing was exported; please report this with the model section of the config."
        )
    return difference


def _documents(target: ExportTarget) -> list[Tensor]:
    """Return random texts of one token up to 512, or to as many as the model has positions for."""
    generator = torch.Generator().manual_seed(0)
    longest = min(target.longest, 512)
    ids = torch.tensor([i for i in range(target.trained.num_tokens) if i not in target.unseen_ids])
    lengths = sorted({1, min(7, longest), min(100, longest), longest})
    return [ids[torch.randint(len(ids), (n,), generator=generator)] for n in lengths]


def _packed_logits(model: Any, documents: list[Tensor]) -> Tensor:
    cu_seqlens = torch.tensor([0, *map(len, documents)]).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(len(ids)) for ids in documents])
    logits: Tensor = model.logits(model(torch.cat(documents), cu_seqlens, positions))
    return logits[:, : model.num_tokens]
