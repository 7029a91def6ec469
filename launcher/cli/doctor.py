"""`enc doctor`."""

import contextlib
import json
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from enc.encoder.errors import EncError
from enc.launcher.cli import complete
from enc.launcher.cli.options import JsonOption, NprocOption, load, ranks_given, say

if TYPE_CHECKING:
    from enc.encoder.config.schema import RunConfig
    from enc.launcher.checks.doctor import Asked, Chapter
    from enc.launcher.checks.findings import Finding
    from enc.launcher.machine.facts import MachineFacts

_WORDS = {
    "green": ("ok", typer.colors.GREEN),
    "yellow": ("look", typer.colors.YELLOW),
    "red": ("bad", typer.colors.RED),
}


def doctor(
    context: typer.Context,
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="CFG",
            help="YAML file or recipe name. Any key can follow: section.key=value",
            autocompletion=complete.configs,
        ),
    ] = None,
    nproc: NprocOption = None,
    nodes: Annotated[int | None, typer.Option("--nodes", metavar="N", min=1, help="Machines.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Short time limits, and no measuring of the disk.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Look for what would spoil a run: on this machine, and for a config. Exit code 3 when something is bad."""
    from enc.launcher.backends.registry import current_job
    from enc.launcher.checks.doctor import FULL, QUICK, diagnose
    from enc.launcher.machine.facts import look

    limits = QUICK if quick else FULL
    machines = {} if nodes is None else {"launch.nodes": nodes}
    loaded = load(config, context, {**machines, **ranks_given(nproc)}) if config else None
    started = time.perf_counter()
    sections = []
    facts = look(current_job(os.environ), limits.probe)
    for section in diagnose(_asked(loaded, facts), facts, limits):
        sections.append(section)
        if not as_json:
            typer.echo(_page(section), color=_colour())
    counts = _counts(sections)
    if as_json:
        listed = [section.as_dict() for section in sections]
        seconds = round(time.perf_counter() - started, 2)
        typer.echo(
            json.dumps({"ok": not counts["red"], "counts": counts, "seconds": seconds, "sections": listed}, indent=1)
        )
    else:
        typer.echo(f"{counts['red']} bad, {counts['yellow']} to look at, {counts['green']} ok.")
        if config is None:
            say("With a config, `enc doctor CFG` checks its run too.")
    sys.stdout.flush()
    raise typer.Exit(3 if counts["red"] else 0)


def _asked(config: "RunConfig | None", facts: "MachineFacts") -> "Asked":
    """Return what the doctor looks at beside the machine."""
    from enc.launcher.backends.registry import BACKENDS, choose_backend
    from enc.launcher.checks.doctor import Asked, run_findings

    chosen, backend = (None, None) if config is None else choose_backend(config)
    schedulers = {each.title: partial(each.probe, chosen, facts) for each in BACKENDS.values() if each.name != "local"}
    if chosen is None or backend is None:
        return Asked(None, False, schedulers, None)

    def run() -> "list[Finding]":
        submitted = chosen
        with contextlib.suppress(EncError):  # said under the scheduler
            submitted = backend.defaults(chosen, lambda text: None)
        return run_findings(submitted, facts, backend.checks)

    return Asked(chosen, chosen.launch.on_cluster, schedulers, run)


def _counts(sections: "Iterable[Chapter]") -> dict[str, int]:
    levels: list[str] = [finding.level for section in sections for finding in section.findings]
    return {level: levels.count(level) for level in _WORDS}


def _colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _page(section: "Chapter") -> str:
    width = min(shutil.get_terminal_size().columns, 100)
    lines = [line for finding in section.findings for line in _lines(finding, width)]
    return "\n".join([typer.style(section.name, bold=True), *lines, ""])


def _lines(finding: "Finding", width: int) -> list[str]:
    """Return a finding as lines; a path that is longer than a line stays whole, to be copied."""
    word, colour = _WORDS[finding.level]
    body = _wrapped(f"{finding.what}: {finding.text}", width, "  ----  ", " " * 8)
    lines = [body[0].replace("----", typer.style(f"{word:<4}", fg=colour), 1), *body[1:]]
    return lines + (_wrapped(finding.fix, width, " " * 8 + "-> ", " " * 11) if finding.fix else [])


def _wrapped(text: str, width: int, first: str, following: str) -> list[str]:
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=following, break_long_words=False, break_on_hyphens=False
    )
