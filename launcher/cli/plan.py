"""`enc plan` and `enc render`: what a run needs on other machines, and the files that its engine reads."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from enc.encoder.errors import UsageError
from enc.launcher.cli.options import (
    OVERRIDES,
    ConfigArgument,
    JsonOption,
    NprocOption,
    SiteOption,
    load,
    ranks_given,
    say,
)

if TYPE_CHECKING:
    from enc.launcher.planning.estimate import Cluster, Variant

render_app = typer.Typer(help="Print a job script or an engine's settings file.", no_args_is_help=True)

NodesOption = Annotated[int, typer.Option("--nodes", metavar="N", min=1, help="Machines.")]
ToOption = Annotated[
    Path | None, typer.Option("--to", metavar="DIR", help="Write the file there and print its path instead.")
]


@render_app.command("deepspeed", context_settings=OVERRIDES)
def render_deepspeed(
    context: typer.Context,
    config: ConfigArgument,
    nproc: NprocOption = None,
    nodes: NodesOption = 1,
    to: ToOption = None,
) -> None:
    """Print the JSON that DeepSpeed is given in a run of this config."""
    _render("deepspeed", context, config, nproc, nodes, to)


@render_app.command("fsdp", context_settings=OVERRIDES)
def render_fsdp(
    context: typer.Context,
    config: ConfigArgument,
    nproc: NprocOption = None,
    nodes: NodesOption = 1,
    to: ToOption = None,
) -> None:
    """Print the JSON that FSDP is given in a run of this config."""
    _render("fsdp", context, config, nproc, nodes, to)


def _render(engine: str, context: typer.Context, config: str, nproc: int | None, nodes: int, to: Path | None) -> None:
    from enc.encoder.engine.settings import engine_files
    from enc.encoder.sizing.batch_split import split_batch
    from enc.launcher.machine.devices import default_ranks

    loaded = load(config, context, {"parallel.engine": engine, **ranks_given(nproc)})
    split = split_batch(loaded.trainer, nodes * default_ranks(loaded))
    ((name, text),) = engine_files(loaded, split).items()
    if to is None:
        typer.echo(text, nl=False)
        return
    _write(to, {name: text})
    typer.echo(str(to / name))


def _write(folder: Path, files: dict[str, str]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        names = ", ".join(files)
        raise UsageError(f"--to {folder}: {names} cannot be written there ({reason}); name another folder.") from None


@render_app.command("slurm", context_settings=OVERRIDES)
def render_slurm(
    context: typer.Context,
    config: ConfigArgument,
    nproc: NprocOption = None,
    nodes: Annotated[int | None, typer.Option("--nodes", metavar="N", min=1, help="Machines.")] = None,
    site: SiteOption = None,
    to: Annotated[
        Path | None,
        typer.Option("--to", metavar="DIR", help="Write script and config there, ready to submit; print its path."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Print the job script of a run. It needs no SLURM: sbatch --parsable "$(enc render slurm CFG --to DIR)"."""
    from enc.encoder.engine.settings import engine_files
    from enc.launcher.backends.slurm.script import SCRIPT_FILE
    from enc.launcher.backends.slurm.submit import script_of
    from enc.launcher.planning.cluster_defaults import submitted_config
    from enc.launcher.planning.plan import make_plan, plan_notes
    from enc.launcher.run_folder.snapshot import snapshot_code

    given = {"launch.nodes": nodes, "launch.site": site, "launch.nproc_per_node": nproc}
    loaded = load(config, context, {key: value for key, value in given.items() if value is not None})
    plan = make_plan(loaded.changed({"launch.scheduler": "slurm"}))
    script = script_of(plan)
    settings = {"config.yaml": submitted_config(plan).to_yaml(), **engine_files(plan.config, plan.split)}
    for note in plan_notes(plan):
        say(note)
    if not plan.store_ready:
        say(f"Note: {plan.store} does not exist yet: the job makes it, or `enc preprocess` does before.")
    if to is not None:
        _make_run_folder(plan.run_dir, {SCRIPT_FILE: script, **settings})  # the job submits its successor from there
        if plan.config.launch.snapshot_code:
            snapshot_code(plan.run_dir)
        _write(to, {SCRIPT_FILE: script, **settings})
        say(f"Wrote {', '.join([SCRIPT_FILE, *settings])} to {to}. The job's run folder is {plan.run_dir}.")
    if as_json:
        launch, names = plan.config.launch, [SCRIPT_FILE, *settings]
        written = None if to is None else {name: str(to / name) for name in names}
        numbers = {"nodes": launch.num_nodes, "nproc_per_node": launch.nproc_per_node}
        typer.echo(json.dumps({"run_dir": str(plan.run_dir), **numbers, "files": written, "script": script}, indent=1))
    else:
        typer.echo(script if to is None else str(to / SCRIPT_FILE), nl=to is not None)


def _make_run_folder(run_dir: Path, files: dict[str, str]) -> None:
    """Write the run folder that a job starts in: SLURM makes no folder for its log, and the run is its config.

    Raises UsageError when the folder holds a run already.
    """
    from enc.encoder.events import Event, append_event
    from enc.launcher.run_folder.lock import RunLock
    from enc.launcher.run_folder.records import refuse_older_run, write_atomically

    lock = RunLock(run_dir)
    try:
        refuse_older_run(run_dir)
        (run_dir / "logs").mkdir(exist_ok=True)
        for name, text in files.items():
            write_atomically(run_dir / name, text)
        append_event(run_dir, Event.RENDERED)
    finally:
        lock.release(remove_if_created=True)


def plan(
    context: typer.Context,
    config: ConfigArgument,
    nproc: NprocOption = None,
    nodes: NodesOption = 1,
    gpu: Annotated[str, typer.Option("--gpu", metavar="NAME", help="Kind of GPU.")] = "h100-80gb",
    mfu: Annotated[
        float, typer.Option("--mfu", metavar="X", min=0.01, max=1.0, help="Share of the peak rate that is reached.")
    ] = 0.4,
    as_json: JsonOption = False,
) -> None:
    """Show what a run would need on machines that you name: memory by engine, hours, checkpoint size."""
    from enc.encoder.gpus import find_gpu
    from enc.launcher.machine.devices import default_ranks
    from enc.launcher.planning.estimate import Cluster, estimate, recommendation, variants
    from enc.launcher.planning.plan import with_expected_vocabulary

    loaded = with_expected_vocabulary(load(config, context, ranks_given(nproc)))
    cluster = Cluster(nodes, default_ranks(loaded), find_gpu(gpu))
    try:
        found, numbers = variants(loaded, cluster), estimate(loaded, cluster, mfu)
    except OverflowError:
        raise UsageError(f"{config}: a number of this run is too large to compute with; lower it.") from None
    advice = recommendation(loaded, cluster, found)
    if as_json:
        machine = {"nodes": nodes, "nproc_per_node": cluster.nproc, "gpu": cluster.gpu.name, "mfu": mfu}
        listed = [variant.as_dict() for variant in found]
        typer.echo(json.dumps({**machine, **numbers, "variants": listed, "recommendation": advice}, indent=1))
        return
    typer.echo(_page(numbers, cluster, mfu, found))
    typer.echo(f"\n{_wrapped(advice)}")


def _page(numbers: dict[str, Any], cluster: "Cluster", mfu: float, found: "list[Variant]") -> str:
    from enc.encoder.text_table import table

    gpus = f"{cluster.nodes:,} x {cluster.nproc:,} {cluster.gpu.name} GPU{'s' if cluster.ranks > 1 else ''}"
    lines = [
        ("model", f"{_scaled(numbers['parameters'], ' parameters')}"),
        ("on", f"{gpus}, {cluster.gpu.bytes / 1e9:.0f} GB each"),
        ("batch", f"{_count(numbers['global_batch_size'], 'row')} = {_count(cluster.ranks, 'rank')} x "
                  f"{_count(numbers['gradient_accumulation_steps'], 'microbatch', 'es')} x "
                  f"{_count(numbers['rows_per_microbatch'], 'row')} of {_count(numbers['row_length'], 'token')}"),
        ("run", f"{_count(numbers['max_steps'], 'step')} of {_count(numbers['tokens_per_step'], 'token')}, "
                f"{_scaled(numbers['total_tokens'], ' tokens')} in all"),
        ("time", f"about {_duration(numbers['hours'])} at {mfu:.0%} of the peak rate "
                 f"({_scaled(numbers['flops_per_step'], 'FLOP')} a step, {_hours(numbers['gpu_hours'])} GPU hours)"),
        ("checkpoint", f"{_scaled(numbers['checkpoint_bytes'], 'B')} each"),
    ]  # fmt: skip
    return f"{table(lines)}\n\n{_memory_table(found)}"


def _memory_table(found: "list[Variant]") -> str:
    """Return GB a GPU: held between steps, at the peak; RAM a machine; whether it fits; the largest microbatch."""
    lines = [f"{'GB a GPU':<26}{'held':>8}{'peak':>8}{'RAM':>8}  {'fits':<6}{'most rows':>10}"]
    for variant in found:
        gigabytes = (variant.static / 1e9, (variant.static + variant.step) / 1e9)
        numbers = "".join(f"{_narrow(size):>8}" for size in gigabytes)
        numbers += f"{_narrow(variant.host / 1e9) if variant.host else '':>8}"
        rows = f"{variant.largest_rows:,}" if variant.largest_rows < 1e8 else f"{variant.largest_rows:.1e}"
        lines.append(f"{variant.name:<26}{numbers}  {'yes' if variant.fits else 'no':<6}{rows:>10}")
    return "\n".join(lines)


def _narrow(number: float) -> str:
    """Return a number in at most 7 characters."""
    if number < 9999.5:
        return f"{number:.2f}"
    return f"{number:,.0f}" if number < 999_999.5 else f"{number:.1e}"


def _scaled(number: float, unit: str) -> str:
    """Return a number of three or four digits with the prefix of its unit, e.g. `2.94 GB`; a noun has a space first."""
    for prefix, size in {"E": 1e18, "P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}.items():
        if number >= size:
            shown = number / size
            digits = ".2f" if shown < 10 else ".1f" if shown < 1e4 else ".1e"
            return f"{shown:{digits}} {prefix}{unit}"
    return f"{number:.3g} {unit.strip()}"


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def _hours(hours: float) -> str:
    return f"{hours:,.1f}" if 1 <= hours < 1e9 else f"{hours:.2g}"


def _duration(hours: float) -> str:
    if hours < 1 / 60:
        return f"{3600 * hours:.2g} seconds"
    if hours < 1:
        return f"{60 * hours:.1f} minutes"
    if hours < 72:
        return f"{hours:.1f} hours"
    years = hours / 24 / 365.25
    return f"{hours / 24:,.1f} days" if years < 3 else f"{_narrow(years)} years"


def _wrapped(text: str) -> str:
    import textwrap

    return textwrap.fill(text, 80, break_long_words=False, break_on_hyphens=False)
