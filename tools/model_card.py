"""The README of an exported folder: what the model is, how to use it, what it was trained on and how."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from enc.encoder.config.schema import RunConfig
from enc.encoder.data.manifest import read_manifest
from enc.tools.models.export_target import HEADS, ExportTarget

OLDEST_TRANSFORMERS = "4.57"
_OBJECTIVES = {
    "mlm": "masked language modelling",
    "mpnet": "masked and permuted language modelling",
    "plm": "permuted language modelling",
}
_METRICS = {
    "loss": "Loss (nats a predicted token)",
    "loss_bits": "Loss (bits a predicted token)",
    "accuracy": "Accuracy of predicted tokens",
    "perplexity": "Perplexity",
}
_PACKAGES = ("enc-toolkit", "torch", "transformers", "tokenizers", "datasets", "deepspeed")


def card_of_run(run_dir: Path, config: RunConfig, step: int, tokens: int) -> dict[str, Any]:
    """Return what a model card can say of a run at a step, as far as the files of the run tell it."""
    records = [record for record in _lines(run_dir / "metrics.jsonl") if record["step"] <= step]
    losses = [record["loss"] for record in records if record.get("loss") is not None]
    tests = [record for record in records if record.get("test_step") == step]
    manifest = _manifest(config.dataset.store)
    return {
        "name": f"{run_dir.name}-{step}",
        "dataset": _dataset_name(manifest["request"]["source"]) if manifest else None,
        "row_length": config.row_length,
        "objective": _OBJECTIVES[config.trained_objective],
        "steps": step,
        "tokens": tokens,
        "loss": losses[-1] if losses else None,
        "data": _data(manifest) if manifest else {},
        "hyperparameters": _hyperparameters(config, run_dir),
        "environment": _environment(run_dir, records),
        "evaluations": [_metrics(record, "eval") for record in records if "eval_loss" in record],
        "metrics": _metrics(tests[-1], "test") if tests else {},
    }


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _manifest(store: Path) -> dict[str, Any] | None:
    """Return the manifest of a token store; None when the store is gone."""
    return read_manifest(store) if (store / "manifest.json").is_file() else None


def _dataset_name(source: dict[str, Any]) -> str:
    """Return what a token store was made from, without the folders of this machine."""
    if source["kind"] == "python-docs":
        return "python-docs"
    return str(source["location"]) if source["kind"] == "hub" else Path(source["location"]).name


def _data(manifest: dict[str, Any]) -> dict[str, str]:
    splits = {
        f"{name.capitalize()} split": f"{split['documents']:,} documents, {split['tokens']:,} tokens"
        for name, split in manifest["splits"].items()
    }
    tokenizer = manifest["tokenizer"]
    return {**splits, "Tokenizer": f"{Path(tokenizer['name']).name}, {tokenizer['num_tokens']:,} tokens"}


def _hyperparameters(config: RunConfig, run_dir: Path) -> dict[str, Any]:
    optimizer, scheduler, trainer = config.optimizer, config.scheduler, config.trainer
    warmup = (
        f"{scheduler.warmup_percent} % of the steps" if scheduler.warmup_percent else f"{scheduler.warmup_steps} steps"
    )
    plan = _last_launch(run_dir).get("plan", {})
    return {
        "Predicted tokens": f"{config.datacollator.mlm_probability:.0%}",
        "Rows a step": plan.get("global_batch_size"),
        "Tokens a step": _number(plan.get("tokens_per_step")),
        "Row length": f"{config.row_length} tokens",
        "Optimizer": f"{optimizer.name}, betas {tuple(optimizer.betas)}, eps {optimizer.eps:g}, "
        f"weight decay {optimizer.weight_decay:g}",
        "Learning rate": f"{optimizer.lr:g}",
        "Schedule": f"{scheduler.name}, warm-up {warmup}",
        "Gradient clipping": f"{trainer.gradient_clipping:g}" if trainer.gradient_clipping else "none",
        "Mixed precision": str(trainer.mixed_precision),
        "Seed": str(config.seed),
    }


def _last_launch(run_dir: Path) -> dict[str, Any]:
    found = sorted(run_dir.glob("launches/*/launch.json"), key=lambda path: int(path.parent.name))
    return json.loads(found[-1].read_text()) if found else {}


def _environment(run_dir: Path, records: list[dict[str, Any]]) -> dict[str, Any]:
    starts = [event for event in _lines(run_dir / "events.jsonl") if event["event"] in ("started", "resumed")]
    seconds = sum(_step_seconds(records))
    hardware = f"{starts[-1]['world_size']} x {starts[-1]['choices'].get('device', 'unknown')}" if starts else None
    found = sorted(run_dir.glob("launches/*/environment.txt"), key=lambda path: int(path.parent.name))
    versions = dict(line.split("==", 1) for line in found[-1].read_text().splitlines() if "==" in line) if found else {}
    return {
        "Hardware": hardware,
        "Time in steps": _duration(seconds) if seconds else None,
        **{f"`{name}`": versions.get(name) for name in _PACKAGES},
    }


def _step_seconds(records: list[dict[str, Any]]) -> Iterator[float]:
    """Yield the seconds of the steps between logged ones, each as long as the logged one was on average."""
    before = 0
    for record in records:
        if record.get("step_s") is not None:
            yield (record["step"] - before) * record["step_s"]
            before = record["step"]


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds:.1f} s"


def _metrics(record: dict[str, Any], prefix: str) -> dict[str, Any]:
    named = {label: record[f"{prefix}_{key}"] for key, label in _METRICS.items() if f"{prefix}_{key}" in record}
    return {"Step": record["step"], **named} if prefix == "eval" else named


def place_to_load(out: Path, repository: str | None) -> str:
    """Return what `from_pretrained` takes: the repository, or the folder as seen from where the command runs."""
    relative = os.path.relpath(out)
    return repository or (str(out.absolute()) if relative.startswith("..") else relative)


def model_card(
    target: ExportTarget, num_parameters: int, card: dict[str, Any], place: str, sentence_transformers: bool = False
) -> str:
    """Render the README. Rows whose value is unknown are absent."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    training = {
        "Dataset": card.get("dataset"),
        **card.get("data", {}),
        "Steps": _number(card.get("steps")),
        "Tokens": _number(card.get("tokens")),
        "Final training loss": _loss(card.get("loss")),
    }
    tables = {
        "Architecture": target.architecture,
        "Training": training,
        "Hyperparameters": card.get("hyperparameters", {}),
        "Environment": card.get("environment", {}),
    }
    known = {title: {k: v for k, v in rows.items() if v is not None} for title, rows in tables.items()}
    return environment.get_template("model_card.md.j2").render(
        card={"license": None, "objective": _OBJECTIVES["mlm"], "metrics": {}, "evaluations": [], "row_length": None}
        | card,
        place=place,
        tag=target.tag,
        tables={title: rows for title, rows in known.items() if rows},
        num_parameters=num_parameters,
        dtype=str(target.config.dtype).removeprefix("torch."),
        trust=", trust_remote_code=True" if target.code else "",
        heads=HEADS[1:],
        transformers=OLDEST_TRANSFORMERS,
        sentence_transformers=sentence_transformers,
    )


def _number(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"


def _loss(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f} nats a predicted token"
