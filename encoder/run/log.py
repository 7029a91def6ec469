"""What a run tells: `metrics.jsonl`, `events.jsonl`, TensorBoard, W&B, the console. Rank 0 only.

`metrics.jsonl` has one line a logged step, one an evaluation and one for the test at the end, in step order; what a
resumed run repeats is moved to `logs/<n>/metrics_repeated.jsonl` first.
"""

import contextlib
import json
import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from enc.encoder.config.schema import RunConfig
from enc.encoder.events import Event, append_event
from enc.encoder.files import replace_atomically
from enc.encoder.run.displays import open_displays
from enc.encoder.tasks import TASKS, TaskRecord, fit

_NOT_PLOTTED = ("step", "time")
_BETWEEN_WORDS_S = 20.0


class RunLog:
    """Writes a run's metrics and events; every method is a no-op on ranks other than 0."""

    def __init__(self, run_dir: Path, config: RunConfig, attempt: int, is_main: bool, start_step: int) -> None:
        self.is_main = is_main
        self.run_dir = run_dir
        self.task = TASKS[config.task]
        self.progress: Progress | None = None
        self.next_word = time.monotonic() + _BETWEEN_WORDS_S
        if not is_main:
            return
        self.console = Console(stderr=True, highlight=False, soft_wrap=False)
        self.log_dir = run_dir / "logs" / str(attempt)
        self.log_dir.mkdir(parents=True, exist_ok=True)
        self.text = (self.log_dir / "console.log").open("a", encoding="utf-8")
        cut_repeated(run_dir / "metrics.jsonl", start_step, self.log_dir / "metrics_repeated.jsonl")
        self.metrics = (run_dir / "metrics.jsonl").open("a", encoding="utf-8")
        self.displays = open_displays(run_dir, config, start_step, self._lost_display)
        if self.console.is_terminal and not config.trainer.disable_tqdm:
            self.progress = _progress_bar(self.console)
            self.bar = self.progress.add_task("", total=config.trainer.max_steps, completed=start_step, status="")

    def start(self) -> None:
        """Show the progress bar, if there is one."""
        if self.progress is not None:
            self.progress.start()

    def advance(self, step: int) -> None:
        """Move the progress bar to a step."""
        if self.progress is not None:
            self.progress.update(self.bar, completed=step)

    def train(self, record: dict[str, Any]) -> None:
        """Log a training record; it must have `step`."""
        if not self.is_main:
            return
        self._write(record, "train")
        line = train_line(record, self.task)
        if self.progress is not None:
            self.progress.update(self.bar, status=status_line(record, self.task))
        self.say(line)

    def evaluation(self, record: dict[str, Any], kind: str = "eval") -> None:
        """Log a record of an evaluation, or of the test with `kind` test; it must have `step`."""
        if not self.is_main:
            return
        self._write(record, kind)
        if self.progress is not None:
            self.progress.update(self.bar, status="")
        self.say(evaluation_line(record, kind, self.task))

    def evaluating(self, done: int, total: int) -> None:
        """Tell how far an evaluation is: beside the bar, or now and then in a line where there is no bar."""
        if self.progress is not None:
            self.progress.update(self.bar, status=f"evaluating, batch {done} of {total}")
        elif self.is_main and time.monotonic() > self.next_word:
            self.next_word = time.monotonic() + _BETWEEN_WORDS_S
            if done:
                self.say(f"              evaluating, batch {done} of {total}")

    def has(self, step: int, key: str) -> bool:
        """Tell whether a record of this step has a key, on rank 0."""
        return self.is_main and any(
            record["step"] == step and key in record
            for record in map(json.loads, (self.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        )

    def event(self, event: Event, /, **fields: Any) -> None:
        """Append an event to `events.jsonl`."""
        if self.is_main:
            append_event(self.run_dir, event, **fields)

    def say(self, text: str) -> None:
        """Print prose to the terminal and to the attempt's log file."""
        if self.is_main:
            with contextlib.suppress(OSError):  # whoever read it has gone
                self.console.print(text, markup=False)
            self._to_file(text)

    def _to_file(self, text: str) -> None:
        self.text.write(text + "\n")
        self.text.flush()

    def _lost_display(self, name: str, error: str) -> None:
        self.event(Event.DISPLAY_LOST, display=name, error=error)
        self.say(f"{name} is lost ({error}): the run goes on without it, and metrics.jsonl has every number.")

    def _write(self, record: dict[str, Any], kind: str) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self.metrics.write(json.dumps(finite) + "\n")
        self.metrics.flush()
        numbers = {f"{kind}/{k}": v for k, v in finite.items() if k not in _NOT_PLOTTED and v is not None}
        for display in self.displays:
            display.show(numbers, record["step"])

    def close(self, exit_code: int) -> None:
        """Close everything; the last lines are on disk when this returns."""
        if not self.is_main:
            return
        if self.progress is not None:
            self.progress.stop()
        for display in self.displays:
            display.close(exit_code)
        for file in (self.metrics, self.text):
            file.close()


def train_line(record: dict[str, Any], task: TaskRecord) -> str:
    """Return a training record as one line of at most 80 characters."""
    rate = record["tokens_per_s"]
    return (
        f"step {record['step']:>7}  loss {task.loss.console(record['loss'])}  grad {fit(record['grad_norm'], 5)}"
        f"  lr {record['learning_rate']:.1e}  {f'{rate / 1000:.0f}k' if rate >= 10_000 else f'{rate:.0f}':>4} tok/s"
    )


def evaluation_line(record: dict[str, Any], kind: str, task: TaskRecord) -> str:
    """Return a record of an evaluation or a test as one line, of at most 80 characters for `pretraining`."""
    step = record.get("test_step", record["step"])
    more = "".join(f", {m.name} {m.console(record[f'{kind}_{m.name}'])}" for m in task.metrics)
    return f"step {step:>7}  {kind} {task.loss.console(record[f'{kind}_loss'])}{more}"


def status_line(record: dict[str, Any], task: TaskRecord) -> str:
    """Return the few numbers that stand beside the progress bar."""
    mfu = "" if record["mfu"] is None else f" · MFU {record['mfu']:.0%}"
    return f"{task.loss.console(record['loss'])} · {record['tokens_per_s']:.0f} tok/s{mfu}"


def cut_repeated(path: Path, start_step: int, moved_to: Path) -> None:
    """Move records past `start_step`, and a half-written last line, out of a metrics file."""
    if not path.exists():
        return
    kept: list[str] = []
    moved: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            step = json.loads(line)["step"] if line.endswith("\n") else math.inf
        except (ValueError, KeyError):
            step = math.inf
        (kept if step <= start_step else moved).append(line)
    if moved:
        with moved_to.open("a", encoding="utf-8") as file:
            file.writelines(moved)
        replace_atomically(path, "".join(kept))


def _progress_bar(console: Console) -> Progress:
    return Progress(
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
        console=console,
        refresh_per_second=4,
        transient=True,
    )
