"""`enc report`: one self-contained HTML page with the curves of one or several runs, and what a reader asks."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from enc.encoder.errors import UsageError
from enc.encoder.files import replace_atomically
from enc.encoder.tasks import TaskRecord
from enc.launcher.run_folder.read import number
from enc.launcher.watch import report_tables as tables
from enc.launcher.watch.charts import NUM_COLOURS, Line, Point, fit_axes, svg
from enc.launcher.watch.event_words import event_rows
from enc.launcher.watch.report_tables import ReportedRun, read_run


class Chart(NamedTuple):
    """What a chart shows: its series are named, and each is a key of the records."""

    title: str
    unit: str
    series: dict[str, str]
    logarithmic: bool = False
    is_share: bool = False


_WHOLE_STEP_TIME = Chart("Step time", "seconds", {"step": "step_s"})
_STEP_TIME = Chart(
    "Step time",
    "seconds",
    {"forward": "forward_s", "backward": "backward_s", "optimizer": "optimizer_s", "data wait": "data_wait_s"},
)
_OF_EVERY_RUN = [
    Chart("Gradient norm", "before clipping", {"norm": "grad_norm"}, logarithmic=True),
    Chart("Learning rate", "", {"rate": "learning_rate"}),
    Chart("Throughput", "tokens per second", {"tokens": "tokens_per_s"}),
    Chart("Model FLOPs utilisation", "of the peak", {"MFU": "mfu"}, is_share=True),
    Chart("Memory", "MB at most", {"memory": "max_memory_mb"}),
    Chart("Rows filled", "", {"fill": "fill"}, is_share=True),
    Chart("Weight norm", "", {"norm": "weight_norm"}),
    Chart("Log-sum-exp of the logits", "mean", {"logsumexp": "logsumexp"}),
    Chart("Training waited for saving", "seconds", {"wait": "save_stall_s"}),
    Chart("Steps left out", "not finite, so far", {"steps": "nonfinite_steps"}),
]
_NO_CURVES = {
    "step", "time", "tokens", "step_s", "forward_s", "backward_s", "optimizer_s", "data_wait_s", "num_labels",
    "eval_labels", "eval_batches", "loss_bits", "eval_loss_bits",
}  # fmt: skip


def write_report(run_dirs: list[Path], path: Path) -> Path:
    """Write one page on one or several runs and return its path. Raises UsageError when it cannot be written."""
    runs = [read_run(run_dir) for run_dir in run_dirs]
    names = _names(runs)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, autoescape=True, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    page = environment.get_template("report.html.j2").render(
        title=" · ".join(names),
        runs=[_shown(run, name) for run, name in zip(runs, names, strict=True)],
        facts=_side_by_side([tables.facts(run) for run in runs]),
        charts=list(_charts(runs, names)),
        differences=tables.differences(runs),
    )
    try:
        replace_atomically(path, page)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written: {error.strerror or error}. Say where the page should be: --output FILE."
        ) from error
    return path


def _names(runs: list[ReportedRun]) -> list[str]:
    """Return what tells runs apart: the names of their folders, or as much of their paths as differs."""
    if len({run.name for run in runs}) == len(runs):
        return [run.name for run in runs]
    above = os.path.commonpath([run.dir for run in runs])
    return [os.path.relpath(run.dir, above) for run in runs]


def _shown(run: ReportedRun, name: str) -> dict[str, Any]:
    columns, rows = tables.evaluations(run)
    return {
        "name": name,
        "path": str(run.dir),
        "columns": columns,
        "evaluations": rows,
        "tables": [
            ("Use", tables.use(run)),
            ("Data", tables.data(run)),
            ("Settings", tables.chosen(run)),
            ("Environment", tables.environment(run)),
            ("Choices at start", list(run.choices.items())),
        ],
        "events": event_rows(run.events),
        "config": run.config,
    }


def _side_by_side(each: list[tables.Rows]) -> list[tuple[str, list[str]]]:
    """Return (name, its value in each of several tables)."""
    found = [dict(rows) for rows in each]
    names = dict.fromkeys(name for rows in found for name in rows)
    return [(name, [rows.get(name, "-") for rows in found]) for name in names]


# --- charts ----------------------------------------------------------------------------------------------------------


def _charts(runs: list[ReportedRun], names: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the charts of runs, all over the same steps: of their task, of every run, of what else was logged."""
    steps = [record["step"] for run in runs for record in run.records]
    known = [*_of_task(runs[0].task), _STEP_TIME if len(runs) == 1 else _WHOLE_STEP_TIME, *_OF_EVERY_RUN]
    for chart in [*known, *_of_the_rest(runs, known)]:
        lines = list(_lines(chart, runs, names))
        ys = [y for line in lines for _, y in line.points]
        if ys and (any(ys) or chart.title not in ("Steps left out", "Training waited for saving")):
            axes = fit_axes(ys, min(steps), max(steps), chart.logarithmic)
            legend = [(line.name, line.colour, line.pale) for line in lines] if len(lines) > 1 else []
            yield {"title": chart.title, "unit": chart.unit, "legend": legend, "svg": svg(axes, lines, chart.is_share)}


def _of_task(task: TaskRecord) -> list[Chart]:
    return [
        Chart(
            m.chart or m.name.capitalize(),
            m.unit or ("" if m.chart else "of the evaluation"),
            {"training": m.name, "evaluation": f"eval_{m.name}"},
            is_share=m.digits.endswith("%"),
        )
        for m in (task.loss, *task.metrics)
    ]


def _of_the_rest(runs: list[ReportedRun], known: list[Chart]) -> list[Chart]:
    """Return a chart for each number of the records that no chart shows; the test has a single one, in a table."""
    shown = _NO_CURVES | {key for chart in known for key in chart.series.values()}
    keys = dict.fromkeys(key for run in runs for record in run.records for key in record)
    rest = [key for key in keys if key not in shown and not key.startswith("test_")]
    return [Chart(key.replace("_", " ").capitalize(), "", {key: key}) for key in rest]


def _lines(chart: Chart, runs: list[ReportedRun], names: list[str]) -> Iterator[Line]:
    """Yield a chart's lines; the colour tells series of one run apart, and else the runs."""
    logged = {key for run in runs for record in run.records for key in record}
    series = [(j, name, key) for j, (name, key) in enumerate(chart.series.items()) if key in logged]
    for i, (run, run_name) in enumerate(zip(runs, names, strict=True)):
        for j, name, key in series:
            if points := list(_points(run.records, key, chart.logarithmic)):
                colour = j if len(runs) == 1 else i
                label = name if len(runs) == 1 else f"{run_name} {name}" if len(series) > 1 else run_name
                yield Line(label, colour % NUM_COLOURS, points, pale=name == "training" and len(series) > 1)


def _points(records: list[dict[str, Any]], key: str, logarithmic: bool) -> Iterator[Point]:
    for record in records:
        value = number(record.get(key))
        if value is not None and (value > 0 or not logarithmic):
            yield record["step"], value
