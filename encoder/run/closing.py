"""The last paragraph of a run: what was trained, how long, from which loss to which, where it is, what comes next."""

import json
import shlex
from pathlib import Path
from typing import Any

from enc.encoder.checkpoints.folder import checkpoints_dir
from enc.encoder.config.schema import RunConfig
from enc.encoder.printable import name_here
from enc.encoder.quantities import span
from enc.encoder.run.state import TrainState
from enc.encoder.tasks import TASKS, Metric, TaskRecord
from enc.encoder.text_table import table


def closing(run_dir: Path, config: RunConfig, state: TrainState, start_step: int, seconds: float) -> str:
    """Return what a person wants to know when a run has reached its last step."""
    task = TASKS[config.task]
    lines = [_work(state, start_step, seconds), *_losses(run_dir / "metrics.jsonl", task, state)]
    lines.append(("checkpoint", str(checkpoints_dir(run_dir) / str(state.step))))
    return f"\n{table(lines)}\n\nNext:\n{_next(run_dir, task, started=state.step > start_step)}"


def _work(state: TrainState, start_step: int, seconds: float) -> tuple[str, str]:
    if state.step == start_step:
        return "finished", f"before this start, at step {state.step:,}: there was nothing left to train"
    since = f"steps {start_step:,} to {state.step:,}" if start_step else f"{state.step:,} steps"
    return "finished", f"{since} in {span(seconds)}; {state.tokens:,} tokens seen in all"


def _losses(metrics: Path, task: TaskRecord, state: TrainState) -> list[tuple[str, str]]:
    """Return what training, evaluations and the test measured, as far as the run logged it."""
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    found = [(title, _change(records, key, task.loss)) for title, key in (
        ("training loss", "loss"), ("evaluation loss", "eval_loss"), ("test loss", "test_loss"))]  # fmt: skip
    if state.best:
        found.append(("best checkpoint", f"step {state.best.step:,}, {state.best.metric} {state.best.value:.4f}"))
    return [(title, text) for title, text in found if text]


def _change(records: list[dict[str, Any]], key: str, metric: Metric) -> str:
    values = [record[key] for record in records if record.get(key) is not None]
    first = f"{values[0]:{metric.digits}} -> " if len(values) > 1 else ""
    return f"{first}{values[-1]:{metric.digits}} {metric.unit}".rstrip() if values else ""


def _next(run_dir: Path, task: TaskRecord, started: bool) -> str:
    run = shlex.quote(name_here(run_dir))
    commands = [(f"enc report {run}", "a page with its curves, settings and events")]
    if task.exports:
        commands.append((f"enc ckpt export {run}", "a folder that transformers loads"))
    if not started:
        commands.append((f"enc resume latest --run {run} --allow-change trainer.max_steps=N", "more steps"))
    return "\n".join(f"  {command}\n      {text}" for command, text in commands)
