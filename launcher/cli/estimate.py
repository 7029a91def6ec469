"""`enc plan`: what a run would need on other machines."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from enc.encoder.errors import UsageError
from enc.launcher.cli.options import ConfigArgument, JsonOption, NprocOption, load, ranks_given
from enc.launcher.cli.render import NodesOption

if TYPE_CHECKING:
    from enc.launcher.planning.estimate import Cluster, Variant


def estimate(
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
    from enc.launcher.machine.facts import look
    from enc.launcher.planning import estimate as planning
    from enc.launcher.planning.plan import with_expected_vocabulary
    from enc.launcher.planning.ranks import ranks_per_node

    loaded = with_expected_vocabulary(load(config, context, ranks_given(nproc)))
    cluster = planning.Cluster(nodes, ranks_per_node(loaded, look()), find_gpu(gpu))
    try:
        found, numbers = planning.variants(loaded, cluster), planning.estimate(loaded, cluster, mfu)
    except OverflowError:
        raise UsageError(f"{config}: a number of this run is too large to compute with; lower it.") from None
    advice = planning.recommendation(loaded, cluster, found)
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
