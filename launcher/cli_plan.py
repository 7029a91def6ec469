"""`enc plan` and `enc render`: what a run needs on other machines, and the files that its engine reads."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from enc.launcher.options import OVERRIDES, ConfigArgument, JsonOption, NprocOption, load, ranks_given

if TYPE_CHECKING:
    from enc.launcher.compare import Cluster, Variant

render_app = typer.Typer(help="Print the settings file of a sharding engine.", no_args_is_help=True)

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
    from enc.encoder.batch_split import split_batch
    from enc.encoder.engine.settings import engine_files
    from enc.launcher.devices import default_ranks

    loaded = load(config, context, {"parallel.engine": engine, **ranks_given(nproc)})
    split = split_batch(loaded.trainer, nodes * default_ranks(loaded))
    ((name, text),) = engine_files(loaded, split).items()
    if to is None:
        typer.echo(text, nl=False)
        return
    to.mkdir(parents=True, exist_ok=True)
    (to / name).write_text(text)
    typer.echo(str(to / name))


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
    from enc.launcher.compare import Cluster, estimate, recommendation, variants
    from enc.launcher.devices import default_ranks
    from enc.launcher.plan import with_expected_vocabulary

    loaded = with_expected_vocabulary(load(config, context, ranks_given(nproc)))
    cluster = Cluster(nodes, default_ranks(loaded), find_gpu(gpu))
    found, numbers = variants(loaded, cluster), estimate(loaded, cluster, mfu)
    advice = recommendation(loaded, cluster, found)
    if as_json:
        machine = {"nodes": nodes, "nproc_per_node": cluster.nproc, "gpu": cluster.gpu.name, "mfu": mfu}
        listed = [variant.as_dict() for variant in found]
        typer.echo(json.dumps({**machine, **numbers, "variants": listed, "recommendation": advice}, indent=1))
        return
    typer.echo(_page(numbers, cluster, mfu, found))
    typer.echo(f"\n{_wrapped(advice)}")


def _page(numbers: dict[str, Any], cluster: "Cluster", mfu: float, found: "list[Variant]") -> str:
    from enc.encoder.metrics import table

    gpus = f"{cluster.nodes} x {cluster.nproc} {cluster.gpu.name} GPU{'s' if cluster.ranks > 1 else ''}"
    lines = [
        ("model", f"{numbers['parameters'] / 1e6:.1f} M parameters"),
        ("on", f"{gpus}, {cluster.gpu.bytes / 1e9:.0f} GB each"),
        ("batch", f"{numbers['global_batch_size']:,} rows = {cluster.ranks} ranks x "
                  f"{numbers['gradient_accumulation_steps']} microbatches x {numbers['rows_per_microbatch']} rows "
                  f"of {numbers['row_length']} tokens"),
        ("run", f"{numbers['max_steps']:,} steps of {numbers['tokens_per_step']:,} tokens, "
                f"{numbers['total_tokens'] / 1e9:,.2f} G tokens in all"),
        ("time", f"about {_duration(numbers['hours'])} at {mfu:.0%} of the peak rate "
                 f"({numbers['flops_per_step'] / 1e12:,.1f} TFLOP a step, {numbers['gpu_hours']:,.1f} GPU hours)"),
        ("checkpoint", f"{numbers['checkpoint_bytes'] / 1e9:,.2f} GB each"),
    ]  # fmt: skip
    return f"{table(lines)}\n\n{_memory_table(found)}"


def _memory_table(found: "list[Variant]") -> str:
    """Return GB a GPU: held between steps, at the peak; RAM a machine; whether it fits; the largest microbatch."""
    lines = [f"{'GB a GPU':<26}{'held':>8}{'peak':>8}{'RAM':>8}  {'fits':<6}{'most rows':>10}"]
    for variant in found:
        gigabytes = (variant.static / 1e9, (variant.static + variant.step) / 1e9)
        numbers = "".join(f"{size:>8.2f}" for size in gigabytes)
        numbers += f"{variant.host / 1e9:>8.2f}" if variant.host else " " * 8
        lines.append(f"{variant.name:<26}{numbers}  {'yes' if variant.fits else 'no':<6}{variant.largest_rows:>10,}")
    return "\n".join(lines)


def _duration(hours: float) -> str:
    if hours < 1:
        return f"{60 * hours:.1f} minutes"
    return f"{hours:,.1f} hours" if hours < 72 else f"{hours / 24:,.1f} days"


def _wrapped(text: str) -> str:
    import textwrap

    return textwrap.fill(text, 80, break_long_words=False, break_on_hyphens=False)
