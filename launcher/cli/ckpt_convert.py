"""`enc ckpt`, making something of checkpoints: consolidate, convert, import, export."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from enc.encoder import progress
from enc.encoder.printable import shown
from enc.launcher.cli import complete
from enc.launcher.cli.ckpt import AnyArgument, any_checkpoint, checkpoint_folder
from enc.launcher.cli.options import checkpoint_argument, load, load_defaults, say

if TYPE_CHECKING:
    from enc.encoder.config.schema import RunConfig
    from enc.tools.consolidate import Written
    from enc.tools.readers.source import Source

CheckpointArgument = Annotated[
    str,
    checkpoint_argument("CKPT", "Checkpoint folder, or a run folder (its latest)."),
]
DtypeOption = Annotated[
    str | None, typer.Option("--dtype", help="Of the weights: fp32 or bf16; by default they stay as they are.")
]


def consolidate(
    source: AnyArgument,
    out: Annotated[str, typer.Option("--out", metavar="PATH", help="New folder, or new file named .safetensors.")],
    dtype: DtypeOption = None,
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", metavar="SIZE", help="Largest file in a folder.")
    ] = "5GB",
) -> None:
    """Write the weights of a checkpoint of any format as safetensors, one tensor at a time; print the path."""
    from enc.tools import consolidate as tool
    from enc.tools.readers.detect import open_source

    opened = open_source(any_checkpoint(source))
    with progress.shown("Consolidating"):
        written = tool.consolidate(opened.weights, Path(out), dtype, max_shard_size)
    _tell(written)


def convert(
    source: AnyArgument,
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="universal, dcp or safetensors.")],
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="New folder.")],
    dtype: DtypeOption = None,
) -> None:
    """Write weights and optimizer moments of a checkpoint of any format in another one; print the path."""
    from enc.tools import convert as tool
    from enc.tools.readers.detect import open_source

    with progress.shown("Converting"):
        written = tool.convert(open_source(any_checkpoint(source)), to, Path(out), dtype)
    _tell(written)


def _tell(written: "Written") -> None:
    say(f"Wrote {written.num_tensors} tensors, {written.num_bytes / 1e6:.1f} MB, in {written.num_files} file(s).")
    if written.left_out:
        names = ", ".join(shown(name) for name in written.left_out[:8])
        more = f" and {len(written.left_out) - 8} more" if len(written.left_out) > 8 else ""
        say(f"Left out, buffers and second names of tied weights: {names}{more}.")
    typer.echo(str(written.path))


def import_checkpoint(
    context: typer.Context,
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="Checkpoint or release. Any config key can follow: section.key=value")
    ],
    out: Annotated[str, typer.Option("--out", metavar="RUN", help="New run folder.")],
    config: Annotated[
        str | None,
        typer.Option(
            "--config",
            metavar="CFG",
            help="Config of the run; by default the checkpoint's own.",
            autocompletion=complete.configs,
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", metavar="DIR", help="Tokenizer; by default the checkpoint's own.")
    ] = None,
    trust_checkpoint: Annotated[
        bool, typer.Option("--trust-checkpoint", help="Run whatever code a .pt file holds, as old ones may need.")
    ] = False,
) -> None:
    """Make a run folder from a checkpoint of NeoBERT or annotated-mpnet, or a release; print its path.

    `enc resume` goes on with it. Of annotated-mpnet name a checkpoint<step>.pt, or its folder for the newest one.
    """
    from enc.tools.import_run import import_run
    from enc.tools.readers.detect import open_source

    if trust_checkpoint:
        say(f"Warning: {source} may run any code while it is read, as --trust-checkpoint says.")
    opened = open_source(any_checkpoint(source), trust_checkpoint)
    tokenizer_dir = Path(tokenizer) if tokenizer else None
    loaded = _config(opened, config, context)
    with progress.shown("Importing"):
        found = import_run(opened, Path(out), loaded, tokenizer_dir)
    say(f"Imported step {found.step}, weights{' and optimizer moments' if found.has_moments else ' only'}.")
    say("Not carried over:" + "".join(f"\n  {line}" for line in found.not_carried))
    say(f"Go on with: enc resume latest --run {found.run_dir} dataset.path=TEXT")
    typer.echo(str(found.run_dir))


def _config(source: "Source", config: str | None, context: typer.Context) -> "RunConfig":
    """Return the config of an imported run: the one named, or what the checkpoint or a file near it tells."""
    from enc.tools.annotated_mpnet.flags import keys_of_args
    from enc.tools.import_run import hf_model_keys, nearest_config
    from enc.tools.readers import annotated

    if config:
        return load(config, context)
    if source.format == annotated.FORMAT:
        return load_defaults(context, keys_of_args(source.config or {}))
    nearest = nearest_config(source.path)
    return load(str(nearest), context) if nearest else load_defaults(context, hf_model_keys(source.path))


def export(
    checkpoint: CheckpointArgument,
    out: Annotated[
        str | None, typer.Option("--out", metavar="DIR", help="New folder; by default <run>/hf/<step>.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="fp32 or bf16.")] = "fp32",
    sentence_transformers: Annotated[
        bool, typer.Option("--sentence-transformers", help="Also for SentenceTransformer(folder), with mean pooling.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an export that is there.")] = False,
    push_to_hub: Annotated[
        str | None, typer.Option("--push-to-hub", metavar="USER/NAME", help="Upload it to the Hugging Face hub too.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
) -> None:
    """Write a folder that transformers loads, after comparing its logits with the training model's; print its path.

    An MPNet becomes transformers' own where that computes the same, else a folder with the model's code.
    """
    from enc.tools.hub import hub_of, push
    from enc.tools.output import refuse_dtype, replaces_export

    folder, place = checkpoint_folder(checkpoint), Path(out) if out else None
    refuse_dtype(dtype)
    if place is not None:
        replaces_export(place, force)
    hub = hub_of(push_to_hub) if push_to_hub else None
    with progress.shown("Exporting, and comparing logits"):
        from enc.tools.export import export_checkpoint  # brings torch and transformers along

        result = export_checkpoint(folder, place, dtype, sentence_transformers, force, push_to_hub)
    say(result.form)
    say(
        f"Exported {result.num_parameters / 1e6:.1f} M parameters, {result.num_bytes / 1e6:.1f} MB; its logits differ "
        f"from the training model's by at most {result.max_difference:.1e} of the largest logit."
    )
    if push_to_hub:
        say(f"Uploaded: {push(hub, result.folder, push_to_hub, private)}")
    typer.echo(str(result.folder))
