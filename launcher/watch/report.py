"""`enc report`: one self-contained HTML page with a run's curves, events and settings.

Curves are drawn as SVG here: a page that a person can mail must carry no megabytes of script and load nothing.
"""

import math
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from enc.encoder.events import EVENTS_FILE
from enc.encoder.files import replace_atomically
from enc.encoder.tasks import TaskRecord
from enc.launcher.run_folder.history import history_of
from enc.launcher.run_folder.read import json_lines, task_of

Point = tuple[float, float]

_PALE, _RED, _BLUE = "#9bb7d4", "#c0392b", "#2f6690"
# title, unit, {series: (colour, records key)}, logarithmic
_Chart = tuple[str, str, dict[str, tuple[str, str]], bool]
_CHARTS_OF_STEPS: list[_Chart] = [
    ("Gradient norm", "before clipping", {"norm": (_BLUE, "grad_norm")}, True),
    ("Learning rate", "", {"rate": (_BLUE, "learning_rate")}, False),
    ("Throughput", "tokens per second", {"tokens": (_BLUE, "tokens_per_s")}, False),
    (
        "Step time",
        "seconds",
        {
            "data wait": ("#e08e45", "data_wait_s"),
            "forward": (_BLUE, "forward_s"),
            "backward": ("#6a994e", "backward_s"),
            "optimizer": ("#8e5a9b", "optimizer_s"),
        },
        False,
    ),
]
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 520, 240, 58, 26, 10, 12


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run folder and return its path."""
    records = json_lines(run_dir / "metrics.jsonl")
    events = json_lines(run_dir / EVENTS_FILE)
    config = (run_dir / "config.yaml").read_text(encoding="utf-8")
    task = task_of(config)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, autoescape=True, trim_blocks=True
    )
    page = environment.get_template("report.html.j2").render(
        name=run_dir.absolute().name,
        path=str(run_dir.absolute()),
        facts=_facts(records, events, task),
        choices=next((e["choices"] for e in reversed(events) if "choices" in e), {}),
        charts=[chart for spec in _charts(task) if (chart := _chart(spec, records))],
        events=[_event_row(event) for event in events],
        config=config,
    )
    path = run_dir / "report.html"
    replace_atomically(path, page)
    return path


def _charts(task: TaskRecord) -> list[_Chart]:
    """Return the charts of a run: those of its task's metrics, and those that every run has."""
    of_metrics: list[_Chart] = [
        (m.chart, m.unit, {"training": (_PALE, m.name), "evaluation": (_RED, f"eval_{m.name}")}, False)
        for m in (task.loss, *task.metrics)
        if m.chart
    ]
    return of_metrics + _CHARTS_OF_STEPS


def _facts(records: list[dict[str, Any]], events: list[dict[str, Any]], task: TaskRecord) -> list[tuple[str, str]]:
    """Return the run's headline numbers as (name, value)."""
    train = [r for r in records if "tokens_per_s" in r]
    evals = [r for r in records if r.get("eval_loss") is not None]
    tests = [r for r in records if r.get("test_loss") is not None]
    loss = task.loss.digits
    facts = [("state", _state(events))]
    if train:
        last = train[-1]
        rate = sorted(r["tokens_per_s"] for r in train)[len(train) // 2]
        facts += [
            ("step", f"{last['step']:,}"),
            ("tokens", f"{last['tokens']:,}"),
            ("training loss", "not finite" if last["loss"] is None else f"{last['loss']:{loss}}"),
            ("median throughput", f"{rate:,.0f} tokens/s"),
        ]
    if evals:
        first, last = evals[0], evals[-1]
        change = f"{first['eval_loss']:{loss}} → " if first is not last else ""
        facts.append(("evaluation loss", f"{change}{last['eval_loss']:{loss}}"))
        shown = [(m, last.get(f"eval_{m.name}")) for m in task.metrics]
        facts += [(m.name, f"{value:{m.digits}}") for m, value in shown if value is not None]
    if tests:
        facts.append(("test loss", f"{tests[-1]['test_loss']:{loss}} of step {tests[-1].get('test_step')}"))
    return facts


_STATES = {
    "signal": "stopped by a signal", "stopped": "stopped by a signal", "failing": "failed", "hang": "hung",
    "starting": "running or killed", "running": "running or killed", "requeued": "queued again",
}  # fmt: skip


def _state(events: list[dict[str, Any]]) -> str:
    status = history_of(events).status
    return _STATES.get(status, status)


def _event_row(event: dict[str, Any]) -> tuple[str, str, str]:
    """Return (time, event, details) for the table of events; sentences first, then the other values."""
    hidden = ("time", "event", "choices", "path", "detail", "reason", "script")
    sentences = [_sentence(event[key]) for key in ("detail", "reason") if event.get(key)]
    values = ", ".join(f"{key} {_value(v)}" for key, v in event.items() if key not in hidden and v not in ([], None))
    return str(event.get("time", "")), str(event.get("event", "")), " ".join([*sentences, values]).strip()


def _sentence(text: Any) -> str:
    words = str(text).strip().rstrip(".")
    return f"{words[:1].upper()}{words[1:]}."


def _value(value: Any) -> str:
    """Return a value without brackets: the items of lists, and `name value` pairs of what they hold."""
    if isinstance(value, list):
        between = "; " if any(isinstance(item, dict | list) or " " in str(item) for item in value) else ", "
        return between.join(map(_value, value))
    if isinstance(value, dict):
        return " ".join(f"{key} {_value(item)}" for key, item in value.items() if item is not None)
    return str(value)


# --- charts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axes:
    """The plotted ranges and how they map to the picture."""

    left: float
    right: float
    low: float
    high: float
    logarithmic: bool

    def x(self, value: float) -> float:
        span = (self.right - self.left) or 1
        return _LEFT + (value - self.left) / span * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        if self.logarithmic:
            share = (math.log10(value) - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        else:
            share = (value - self.low) / (self.high - self.low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP)


def _chart(spec: _Chart, records: list[dict[str, Any]]) -> dict[str, str] | None:
    title, unit, series, logarithmic = spec
    lines: dict[str, tuple[str, list[Point]]] = {}
    for name, (colour, key) in series.items():
        points = [(r["step"], r[key]) for r in records if r.get(key) is not None and (r[key] > 0 or not logarithmic)]
        if points:
            lines[name] = (colour, points)
    if not lines:
        return None
    axes = _axes([point for _, points in lines.values() for point in points], logarithmic)
    legend = {name: colour for name, (colour, _) in lines.items()} if len(lines) > 1 else {}
    return {"title": title, "unit": unit, "legend": legend, "svg": _svg(axes, lines)}  # type: ignore[dict-item]


def _axes(points: list[Point], logarithmic: bool) -> Axes:
    """Fit the ranges to the points; a linear axis of small relative spread does not start at zero."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high = min(ys), max(ys)
    if logarithmic:
        return Axes(min(xs), max(xs), low / 1.2, high * 1.2, True)
    if low >= 0 and low < 0.5 * high:
        low = 0.0
    margin = (high - low or abs(high) or 1) * 0.05
    return Axes(min(xs), max(xs), low - margin if low else 0.0, high + margin, False)


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return round numbers inside a range, about `count` of them."""
    raw = (high - low) / count
    size = 10 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= raw)
    first = math.ceil(low / step)
    return [i * step for i in range(first, math.floor(high / step) + 1)]


def _svg(axes: Axes, lines: dict[str, tuple[str, list[Point]]]) -> str:
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">']
    ticks = _log_ticks(axes.low, axes.high) if axes.logarithmic else _ticks(axes.low, axes.high)
    for value in ticks:
        y = axes.y(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="y" x="{_LEFT - 6}" y="{y + 4:.1f}">{_label(value)}</text>')
    for value in _ticks(axes.left, axes.right or 1):
        parts.append(f'<text class="x" x="{axes.x(value):.1f}" y="{_HEIGHT - 8}">{_label(value)}</text>')
    for name, (colour, points) in lines.items():
        parts.append(_line(axes, name, colour, points))
    return "".join([*parts, "</svg>"])


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [10.0**p for p in powers if low <= 10.0**p <= high]
    return ticks if len(ticks) > 1 else [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= m * 10.0**p <= high]


def _line(axes: Axes, name: str, colour: str, points: list[Point]) -> str:
    places = [(axes.x(x), axes.y(y)) for x, y in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    # few points (evaluations) get dots, so that a single one is seen at all
    dots = (
        "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{colour}"/>' for x, y in places)
        if len(places) < 40
        else ""
    )
    label = escape(f"{name}: {points[-1][1]:.4g} at step {points[-1][0]:g}")
    return f'<g><title>{label}</title><polyline points="{path}" stroke="{colour}"/>{dots}</g>'


def _label(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 10000:
        return f"{value / 1000:g}k"
    return f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.1e}"
