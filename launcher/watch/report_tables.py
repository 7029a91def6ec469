"""What a report tells of one run beside its curves: tables of (name, value). Nothing in a run folder can stop it."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from enc.encoder.events import EVENTS_FILE, Event
from enc.encoder.quantities import span
from enc.encoder.tasks import Metric, TaskRecord
from enc.launcher.run_folder.read import count, json_lines, json_object, newest_attempt, number, seconds, tail, task_of
from enc.launcher.watch.run_state import ACTIVE, RunState, last_checkpoint
from enc.launcher.watch.which import files_of, state_now

Rows = list[tuple[str, str]]

_PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "deepspeed", "triton", "flash-attn", "numpy")
_SETTINGS = (
    "model.type", "model.num_hidden_layers", "model.hidden_size", "model.num_attention_heads",
    "model.intermediate_size", "model.max_position_embeddings", "model.hidden_act", "model.vocab_size",
    "model.dropout_prob", "dataset.max_seq_length", "datacollator.mlm_probability", "datacollator.whole_word",
    "datacollator.pack_sequences", "trainer.global_batch_size", "trainer.max_steps", "optimizer.name", "optimizer.lr",
    "optimizer.betas", "optimizer.weight_decay", "scheduler.name", "scheduler.warmup_steps",
    "scheduler.final_lr_ratio", "trainer.gradient_clipping", "trainer.mixed_precision", "parallel.engine", "seed",
)  # fmt: skip
_PLACES = ("trainer.output_dir", "trainer.resume_from_checkpoint")


@dataclass
class ReportedRun:
    """What was read of a run."""

    dir: Path
    records: list[dict[str, Any]]
    events: list[dict[str, Any]]
    config: str
    task: TaskRecord
    state: RunState
    launch: dict[str, Any] = field(default_factory=dict)
    packages: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.dir.name

    @property
    def plan(self) -> dict[str, Any]:
        plan = self.launch.get("plan")
        return plan if isinstance(plan, dict) else {}

    @property
    def choices(self) -> dict[str, Any]:
        """What was resolved at the newest start."""
        return next((e["choices"] for e in reversed(self.events) if isinstance(e.get("choices"), dict)), {})


def read_run(run_dir: Path) -> ReportedRun:
    """Read all that a report tells of a run."""
    files = files_of(str(run_dir))
    launch = files.dir / "launches" / str(newest_attempt(files.dir))
    config = tail(files.dir / "config.yaml", -1).decode(errors="replace")
    records = [r for r in json_lines(files.dir / "metrics.jsonl") if count(r.get("step")) is not None]
    return ReportedRun(
        dir=files.dir,
        records=records,
        events=json_lines(files.dir / EVENTS_FILE),
        config=config,
        task=task_of(config),
        state=state_now(files)[0],
        launch=json_object(launch / "launch.json"),
        packages=tail(launch / "environment.txt", -1).decode(errors="replace").split(),
    )


def facts(run: ReportedRun) -> Rows:
    """Return the run's headline numbers."""
    train = [r for r in run.records if number(r.get("tokens_per_s")) is not None]
    evals = [r for r in run.records if number(r.get("eval_loss")) is not None]
    tests = [r for r in run.records if number(r.get("test_loss")) is not None]
    found = [("state", run.state.state), ("step", _step(run.state)), ("training time", span(trained_s(run)))]
    if count(run.plan.get("parameters")):
        found.append(("parameters", _short(run.plan["parameters"])))
    if train:
        rate = sorted(r["tokens_per_s"] for r in train)[len(train) // 2]
        found += [
            ("tokens", _short(train[-1].get("tokens"))),
            ("median throughput", f"{rate:,.0f} tokens/s"),
            ("training loss", _change(train, "loss", run.task.loss)),
        ]
    if evals:
        found.append(("evaluation loss", _change(evals, "eval_loss", run.task.loss)))
        found += [(m.name, _metric(m, evals[-1].get(f"eval_{m.name}"))) for m in run.task.metrics]
    if tests:
        tested = _metric(run.task.loss, tests[-1]["test_loss"])
        found.append(("test loss", f"{tested} of step {tests[-1].get('test_step')}"))
    return found


def _step(state: RunState) -> str:
    total = f" of {state.total_steps:,}" if state.total_steps else ""
    return ("none yet" if state.step is None else f"{state.step:,}") + total


def _change(records: list[dict[str, Any]], key: str, metric: Metric) -> str:
    first, last = records[0].get(key), records[-1].get(key)
    before = f"{_metric(metric, first)} → " if len(records) > 1 else ""
    return before + _metric(metric, last)


def _metric(metric: Metric, value: Any) -> str:
    found = number(value)
    return "not finite" if found is None else f"{found:{metric.digits}}"


def _short(value: Any) -> str:
    """Return a count with three digits or so: 1,234, 12.3 k, 618 k, 1.50 M."""
    size = number(value)
    if size is None:
        return "unknown"
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            scaled = size / (1e3 if name == "k" else unit)
            return f"{scaled:.{max(0, 3 - len(str(int(scaled))))}f} {name}"
    return f"{size:,.0f}"


def trained_s(run: ReportedRun) -> float | None:
    """Return the seconds in which the run was at work, from each start to the last that was heard of it."""
    starts = [event for event in run.events if event.get("event") in (Event.STARTED, Event.RESUMED)]
    begins = [t for event in starts if (t := seconds(event.get("time")))]
    heard = [t for e in run.events if (t := seconds(e.get("time")))]
    heard += [t for r in run.records if (t := number(r.get("time")))]
    if run.state.state in ACTIVE and run.state.alive:
        heard.append(time.time())
    ends = [*begins, float("inf")][1:]
    spans = [max((t for t in heard if b <= t < e), default=b) - b for b, e in zip(begins, ends, strict=True)]
    return sum(spans) if spans else None


def environment(run: ReportedRun) -> Rows:
    """Return where and with what the run was started: the newest launch."""
    launch, git = run.launch, run.launch.get("git")
    found = [
        ("started", launch.get("time")), ("host", launch.get("host")), ("job", launch.get("job")),
        ("command", launch.get("command")), ("device", run.choices.get("device")),
        ("processes", run.plan.get("world_size")), ("system", launch.get("system")),
        ("enc", launch.get("enc")), ("Python", launch.get("python")), ("git", _git(git)),
    ]  # fmt: skip
    versions = dict(line.split("==", 1) for line in run.packages if "==" in line)
    return _texts(found + [(name, versions.get(name)) for name in _PACKAGES])


def _git(git: Any) -> str | None:
    if not isinstance(git, dict):
        return None
    changed = git.get("changed_files")
    return f"{git.get('commit')}" + (f", {changed} files changed since" if changed else "")


def _texts(found: list[tuple[str, Any]]) -> Rows:
    return [(name, str(value)) for name, value in found if value not in (None, "")]


def data(run: ReportedRun) -> Rows:
    """Return what the run is trained on, as its token store says."""
    store = run.plan.get("store")
    manifest = json_object(Path(str(store)) / "manifest.json") if store else {}
    splits, tokenizer = manifest.get("splits"), manifest.get("tokenizer")
    found: list[tuple[str, Any]] = [("token store", store)]
    for name, split in splits.items() if isinstance(splits, dict) else ():
        found.append((f"split {name}", _split(split)))
    if isinstance(tokenizer, dict):
        found.append(("tokenizer", f"{tokenizer.get('name')}, {_short(tokenizer.get('num_tokens'))} tokens"))
    trained, corpus = number(run.plan.get("total_tokens")), number(run.plan.get("corpus_tokens"))
    if trained and corpus:
        found.append(("epochs", f"{trained / corpus:.2g}"))
    return _texts([*found, ("rows", run.choices.get("data"))])


def _split(split: Any) -> str:
    documents, tokens = count(split["documents"]) or 0, count(split["tokens"]) or 0
    return f"{documents:,} documents, {tokens:,} tokens, {tokens / max(documents, 1):,.0f} a document"


def settings(config: str) -> dict[str, str]:
    """Return every key of a config, dotted, with its value."""
    try:
        content = yaml.safe_load(config)
    except yaml.YAMLError:
        return {}
    return dict(_flat(content if isinstance(content, dict) else {}))


def _flat(content: dict[Any, Any], prefix: str = "") -> Rows:
    rows: Rows = []
    for key, value in content.items():
        name = f"{prefix}{key}"
        rows += _flat(value, f"{name}.") if isinstance(value, dict) else [(name, _plain(value))]
    return rows


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return "-" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def chosen(run: ReportedRun) -> Rows:
    """Return the settings that a reader asks for first."""
    keys = settings(run.config)
    return [(key, keys[key]) for key in _SETTINGS if key in keys]


def differences(runs: list[ReportedRun]) -> list[tuple[str, list[str]]]:
    """Return (key, its value in each run) of the settings in which runs differ; where they lie does not count."""
    each = [settings(run.config) for run in runs]
    keys = dict.fromkeys(key for keys in each for key in keys if key not in _PLACES)
    rows = [(key, [keys.get(key, "-") for keys in each]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def evaluations(run: ReportedRun) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Return the names of what was measured, and (step, values) of each evaluation and test, the best one marked."""
    metrics = [run.task.loss, *run.task.metrics]
    best = max((e.get("step", -1) for e in run.events if e.get("event") == Event.BEST), default=None)
    rows = []
    for record in run.records:
        for kind in ("eval", "test"):
            if f"{kind}_loss" in record:
                step = f"{record.get('test_step', record['step']):,}"
                mark = " (test)" if kind == "test" else " (best)" if record["step"] == best else ""
                rows.append((step + mark, [_metric(m, record.get(f"{kind}_{m.name}")) for m in metrics]))
    return [m.name + (f" ({m.unit})" if m.unit else "") for m in metrics], rows


def use(run: ReportedRun) -> Rows:
    """Return where the model is and what to do next."""
    checkpoint, _ = last_checkpoint(run.dir, time.time())
    exports = sorted((path for path in run.dir.glob("hf/*") if path.is_dir()), key=lambda path: path.stat().st_mtime)
    found: Rows = []
    if checkpoint:
        found.append(("newest checkpoint", checkpoint["path"]))
    if exports:
        found.append(("export for transformers", str(exports[-1])))
        found.append(("load it", f'AutoModelForMaskedLM.from_pretrained("{exports[-1]}", trust_remote_code=True)'))
    elif checkpoint and run.task.exports:
        found.append(("export it", f"enc ckpt export {checkpoint['path']}"))
    return found
