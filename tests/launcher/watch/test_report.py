"""The report: a page for every run there can be, whose numbers are those of its files."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from running import Enc

from enc.launcher.watch.charts import Line as ChartLine
from enc.launcher.watch.charts import fit_axes, label, svg, ticks
from enc.launcher.watch.event_words import event_rows
from enc.launcher.watch.report_tables import differences, facts, read_run, trained_s


def write_run(
    run: Path, records: list[dict[str, Any]], events: Sequence[dict[str, Any]] = (), config: str = ""
) -> Path:
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(f"task: pretraining\n{config}trainer:\n  max_steps: 1000\n")
    (run / "metrics.jsonl").write_text("".join(json.dumps({"time": 1e9, **r}) + "\n" for r in records))
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return run


TRAINED = {"loss": 3.0, "tokens_per_s": 1000.0, "tokens": 512, "grad_norm": 2.0, "learning_rate": 1e-4}
EVALUATED = {"eval_loss": 2.5, "eval_accuracy": 0.25, "eval_perplexity": 12.2}


@pytest.mark.parametrize(
    "records",
    [
        [],
        [{"step": 0, **EVALUATED}],
        [{"step": 7, **EVALUATED}],
        [{"step": 7, **TRAINED}],
        [{"step": 7, **TRAINED, "loss": None, "grad_norm": None}],
        [{"step": 7, **TRAINED, "loss": 0.0, "grad_norm": 0.0, "learning_rate": 0.0}],
        [{"step": step, **TRAINED} for step in range(1, 3)],
        [{"step": step, **TRAINED, "grad_norm": "nan", "tokens": None} for step in range(1, 3)],
        [{"step": 10**9, **TRAINED, "loss": -1e200, "mfu": None}],
    ],
)
def test_any_record_gives_a_page(enc: Enc, records: list[dict[str, Any]]) -> None:
    """A run that has logged nothing, once, or one value only has a report, and so has one whose numbers are odd."""
    run = write_run(enc.folder / "run", records)
    page = (enc.folder / enc("report", "run").stdout.strip()).read_text()
    assert "nan," not in page
    assert page.count("<svg") == page.count("</svg>")
    assert ("Nothing is logged" in page) == (not records)
    assert run.exists()


def test_a_page_that_cannot_be_written_is_refused(enc: Enc) -> None:
    """The report of a run that one may only read goes elsewhere."""
    write_run(enc.folder / "run", [{"step": 1, **TRAINED}])
    refused = enc("report", "run", "--output", "nowhere/page.html", code=2).stderr
    assert "nowhere/page.html cannot be written: No such file or directory" in refused
    assert "--output FILE" in " ".join(refused.split())
    enc("report", "run", "--output", "page.html")
    assert not (enc.folder / "run" / "report.html").exists()


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1000, "1,000"), (1200, "1,200"), (800, "800"), (0.0001, "0.0001"), (2.5e-5, "2.5e-5"),
     (12_500, "12.5k"), (3e6, "3M"), (-1000, "-1,000"), (0.1 + 0.2, "0.3")],
)  # fmt: skip
def test_labels_are_written_as_people_do(value: float, text: str) -> None:
    assert label(value) == text


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 7), (3, 3000), (995, 1005), (0, 10**9)])
def test_steps_have_whole_ticks(low: float, high: float) -> None:
    found = ticks(low, high, smallest=1)
    assert all(float(tick).is_integer() and low <= tick <= high for tick in found)
    assert 1 <= len(found) <= 12


@pytest.mark.parametrize("values", [[2.0], [2.0, 2.9], [1.46, 2.4], [1e-9, 1e9], [7.0, 7.0]])
def test_a_logarithmic_axis_has_two_labels_at_least(values: list[float]) -> None:
    axes = fit_axes(values, 0, 10, logarithmic=True)
    drawn = svg(axes, [ChartLine("norm", 0, [(float(i), v) for i, v in enumerate(values)])])
    assert drawn.count('class="y"') >= 2


def test_a_spike_survives_thinning() -> None:
    """A run of a hundred thousand records is drawn in a page that opens, with every extreme."""
    points = [(float(i), 1.0) for i in range(100_000)]
    points[77_777] = (77_777.0, 50.0)
    axes = fit_axes([y for _, y in points], 0, 100_000, logarithmic=False)
    drawn = svg(axes, [ChartLine("loss", 0, points)])
    assert f"{axes.x(77_777):.1f},{axes.y(50):.1f}" in drawn
    assert len(drawn) < 150_000


def test_the_page_shows_every_metric_and_what_the_run_was(enc: Enc, finished_run: Path) -> None:
    """Environment, data, settings, evaluations; each number of the records has a curve, with a unit."""
    shutil.copytree(finished_run, enc.folder / "run")
    page = (enc.folder / enc("report", "run").stdout.strip()).read_text()
    for part in ("Memory", "Weight norm", "Rows filled", "Throughput", "Log-sum-exp", "Perplexity", "nats per label",
                 "<td>torch</td>", "<td>Python</td>", "<td>command</td>", "optimizer.lr", "618,469 tokens",
                 "enc ckpt export", "6 of 6", "Training reached its last step, 6.",
                 "prefers-color-scheme: dark"):  # fmt: skip
        assert part in page, part
    assert "e+03" not in page
    assert re.search(r"<td>6( \(best\))?</td><td>\d\.\d{4}</td><td>\d+\.\d\d%</td>", page)


def test_runs_stand_side_by_side(enc: Enc) -> None:
    """Two runs share their charts; what differs in their settings is listed, and where they lie is no difference."""
    for name, rate in (("a/run", 1), ("b/run", 2)):
        place = f"optimizer:\n  lr: {rate}.0\nwandb:\n  dir: same\n"
        write_run(enc.folder / name, [{"step": s, **TRAINED, "loss": float(rate)} for s in (1, 2)], config=place)
    printed = enc("report", "a/run", "b/run").stdout.strip()
    page = (enc.folder / printed).read_text()
    assert printed == "comparison.html"
    assert "<th>a/run</th><th>b/run</th>" in page
    assert "<tr><td>optimizer.lr</td><td>1.0</td><td>2.0</td></tr>" in page
    assert "a/run: 1 at step 2" in page
    assert "b/run: 2 at step 2" in page
    runs = [read_run(enc.folder / name) for name in ("a/run", "b/run")]
    assert [key for key, _ in differences(runs)] == ["optimizer.lr"]


def test_the_state_is_that_of_status(enc: Enc) -> None:
    """A run whose process is gone without a word is lost, not 'running or killed'."""
    events = [{"time": "2026-11-28T10:00:00+0000", "event": "started", "step": 0, "world_size": 1}]
    write_run(enc.folder / "run", [{"step": 1, **TRAINED}], events)
    state = json.loads(enc("status", "run", "--json").stdout)["state"]
    assert dict(facts(read_run(enc.folder / "run")))["state"] == state


def test_pauses_between_attempts_are_no_training_time(tmp_path: Path) -> None:
    """Two attempts of 10 and 20 seconds, an hour apart, have trained for 30."""
    times = ("10:00:00", "started"), ("10:00:10", "signal"), ("11:00:00", "resumed"), ("11:00:20", "finished")
    events = [{"time": f"2001-11-28T{clock}+0000", "event": name, "step": 1} for clock, name in times]
    run = write_run(tmp_path / "run", [], events)
    assert trained_s(read_run(run)) == 30


def test_events_are_sentences() -> None:
    saved = {"time": "2026-11-28T10:00:00+0000", "event": "saved", "step": 1200, "path": "/x", "seconds": 1.266,
             "stall_seconds": 0.036, "deleted": []}  # fmt: skip
    later = {"time": "2026-11-28T11:30:00+0000", "event": "best", "step": 1200, "eval_loss": 2.5}
    assert event_rows([saved, later]) == [
        ("2026-11-28 10:00:00", "+0 s", "saved", "Checkpoint of step 1,200 saved in 1.3 s; training waited 0.036 s."),
        ("2026-11-28 11:30:00", "+1 h 30 min", "best", "Step 1,200 is the best so far: eval loss 2.5."),
    ]
