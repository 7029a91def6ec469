"""How the states of runs are shown on 80 columns. Pure."""

from dataclasses import asdict
from typing import Any

from enc.encoder.printable import jsonable, printable
from enc.encoder.quantities import size_text, span
from enc.encoder.text_table import table
from enc.launcher.watch.run_state import ACTIVE, OVER, RunState


def ago(seconds: float | None) -> str:
    """Return how long ago something was; a time to come means that two clocks differ."""
    if seconds is None:
        return "unknown"
    if seconds < -5:
        return f"{span(seconds)} in the future (clocks differ)"
    return f"{span(max(0.0, seconds))} ago"


def status_text(state: RunState, problem: str | None = None) -> str:
    """Lay out one run's state as aligned lines; `problem` is why its scheduler could not be asked."""
    lines: list[tuple[str, str | None]] = [
        ("run", state.run),
        ("state", _state(state)),
        ("why" if state.state in OVER else "last stop", state.why),
        ("job", _job(state, problem)),
        ("nodes", _nodes(state)),
        ("step", _step(state)),
        ("loss", _loss(state.loss, state.loss_is_finite)),
        ("speed", _speed(state)),
        ("left", _left(state)),
        ("doing", _doing(state)),
        ("heard of", ago(state.heard_s)),
        ("silent", _silent(state)),
        ("checkpoint", _checkpoint(state)),
        ("restarts", ", ".join(f"{cause} {num}" for cause, num in sorted(state.restarts.items()))),
        ("excluded", ", ".join(state.excluded_nodes)),
        ("slowest", _slowest(state.straggler)),
        ("unreadable", ", ".join(state.unreadable)),
    ]
    return table([(name, printable(text)) for name, text in lines if text])


def _state(state: RunState) -> str:
    attempt = f", attempt {state.attempt}" if state.attempt and state.attempt > 1 else ""
    return f"{state.state}{attempt}" + (f". {state.detail}" if state.detail else "")


def _job(state: RunState, problem: str | None) -> str | None:
    if state.job is None:
        if state.state not in ACTIVE:
            return None
        return f"none: it runs here, process {state.pid}" if state.pid and state.alive else "none: a local run"
    if state.job_state is None:
        unknown = f"{state.job}, which {state.scheduler} does not know (any more)"
        return f"{state.job}. {problem}" if problem else unknown
    if state.job_waits:
        return f"{state.job} {state.job_state} ({state.job_reason})"
    times = f", {state.job_elapsed} of {state.job_time_limit}" if state.job_time_limit else ""
    return f"{state.job} {state.job_state}{times}"


def _nodes(state: RunState) -> str | None:
    if state.nodes:
        return ", ".join(state.nodes)
    if state.job is not None:
        return f"{state.num_nodes} asked for" if state.num_nodes else None
    return state.host


def _step(state: RunState) -> str:
    if state.step is None:
        known = not {"events.jsonl", "metrics.jsonl"} & set(state.unreadable)
        return ("none yet" if known else "unknown") + (f" of {state.total_steps:,}" if state.total_steps else "")
    if not state.total_steps:
        return f"{state.step:,} (of how many is not known)"
    share = state.step / state.total_steps
    return f"{state.step:,} of {state.total_steps:,} ({share:.{0 if share >= 0.01 else 2}%})"


def _loss(loss: float | None, is_finite: bool | None) -> str | None:
    if is_finite is None:
        return None
    return "not finite" if loss is None else f"{loss:.4f}"


def _speed(state: RunState) -> str | None:
    rate = None if state.tokens_per_s is None else f"{state.tokens_per_s:,.0f} tokens/s"
    pace = None if state.s_per_step is None else f"{state.s_per_step:.3g} s a step"
    return ", ".join(part for part in (rate, pace) if part) or None


def _left(state: RunState) -> str | None:
    if state.eta_s is None or state.state == "stopping":
        return None
    return f"about {span(state.eta_s)}" + ("" if state.state == "running" else " of training")


def _doing(state: RunState) -> str | None:
    if not state.phases or not state.alive:
        return None
    if len(state.phases) == 1:
        (phase, num), *_ = state.phases.items()
        return f"{phase}, {_ranks(num)}"
    parts = sorted(state.phases.items(), key=lambda item: -item[1])
    return ", ".join(f"{phase} ({_ranks(num)})" for phase, num in parts)


def _ranks(num: int) -> str:
    return f"{num} rank{'' if num == 1 else 's'}"


def _silent(state: RunState) -> str | None:
    if not state.silent_ranks or not state.alive:
        return None
    shown = [f"rank {r['rank']}{_on(r['host'])} for {span(r['silent_s'])}" for r in state.silent_ranks[:4]]
    more = len(state.silent_ranks) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _on(host: str | None) -> str:
    return f" on {host}" if host else ""


def _checkpoint(state: RunState) -> str:
    damaged = f"; {state.passed_over} newer not complete" if state.passed_over else ""
    found = state.checkpoint
    if found is None:
        return "unknown" if "checkpoints" in state.unreadable else f"none{damaged}"
    return f"step {found['step']:,}, {size_text(found['bytes'])}, {ago(found['age_s'])}{damaged}"


def _slowest(straggler: dict[str, Any] | None) -> str | None:
    if straggler is None:
        return None
    ratio = f", {straggler['ratio']:.2f} times as long a step" if straggler["ratio"] else ""
    step = f" (step {straggler['step']:,})" if straggler["step"] is not None else ""
    return f"rank {straggler['rank']}{_on(straggler['host'])}{ratio}{step}"


# --- a list of runs --------------------------------------------------------------------------------------------------


# The names that scripts know, from when there was one scheduler.
_JSON_NAMES = {f"job_{name}": f"slurm_{name}" for name in ("state", "reason", "elapsed", "time_limit")}


def as_json(state: RunState) -> dict[str, Any]:
    """Return one run's state for JSON."""
    own = ("scheduler", "job_waits")
    values = {_JSON_NAMES.get(key, key): value for key, value in asdict(state).items() if key not in own}
    facts: dict[str, Any] = jsonable(values)
    return facts


def runs_text(states: list[tuple[str, RunState]]) -> str:
    """Lay out (name, state) pairs as a table of 80 columns; a long name loses its middle."""
    rows = [("STATE", "STEP", "LOSS", "AGE", "JOB")]
    for _, state in states:
        rows.append(
            (state.state, _short_step(state), _short_loss(state), _short_span(state.heard_s), _short_job(state))
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    room = max(12, 80 - sum(widths) - 2 * len(widths))
    names = ["RUN", *(printable(name, room) for name, _ in states)]
    room = max(len(name) for name in names)
    lines = []
    for name, row in zip(names, rows, strict=True):
        cells = [
            cell.rjust(w) if 0 < i < 4 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join([name.ljust(room), *cells]).rstrip())
    return "\n".join(lines)


def _short_job(state: RunState) -> str:
    return printable(state.job or "-", 12)


def _short_step(state: RunState) -> str:
    return f"{'-' if state.step is None else state.step}/{state.total_steps or '?'}"


def _short_loss(state: RunState) -> str:
    if state.loss_is_finite is None:
        return "-"
    return "nan" if state.loss is None else f"{state.loss:.3f}"


def _short_span(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    if seconds < -5:
        return "future"
    return " ".join(span(max(0.0, seconds)).split()[:2])
