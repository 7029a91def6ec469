"""`enc bench`: kernels and training steps measured against what others offer."""

import os
from pathlib import Path
from typing import Annotated

import typer

from enc.launcher.cli import complete
from enc.launcher.cli.options import OVERRIDES, JsonOption, overrides_among, say

app = typer.Typer(help="Measure speed and memory against other tools, on this machine.", no_args_is_help=True)

DeviceOption = Annotated[
    str | None, typer.Option("--device", metavar="D", help="cpu or cuda; the GPU where there is one.")
]
ThreadsOption = Annotated[int | None, typer.Option("--threads", metavar="N", min=1, help="Threads of torch.")]
ClockOption = Annotated[
    str, typer.Option("--clock", metavar="C", help="wall, or cpu: processor time, for a busy machine with --threads 1.")
]
PageOption = Annotated[Path | None, typer.Option("--to", metavar="FILE", help="Write a dated Markdown page there too.")]


def _words(text: str | None) -> list[str] | None:
    """Return the parts of `a,b`; None for an option that was not given."""
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]


@app.command()
def kernels(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="KERNEL", help="masked_ce, varlen_attention ...; all by default.")
    ] = None,
    device: DeviceOption = None,
    dtype: Annotated[str, typer.Option("--dtype", metavar="A,B", help="bf16, fp32, fp16.")] = "bf16,fp32",
    shape: Annotated[
        list[str] | None,
        typer.Option("--shape", metavar="S", help="A shape's name or key=value,...; can be repeated."),
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", min=1, help="Times that each side runs.")] = 10,
    rivals: Annotated[
        str | None, typer.Option("--rivals", metavar="A,B", help="Sides besides enc; all by default.")
    ] = None,
    threads: ThreadsOption = None,
    clock: ClockOption = "wall",
    as_json: JsonOption = False,
    to: PageOption = None,
) -> None:
    """Measure kernels: time, peak memory, error, share of this device's measured peak."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which counts memory, would speak on stderr
    from enc.tools.bench.kernels import Asked, bench

    asked = Asked(
        names or [], device, _words(dtype) or [], shape or [], _words(rivals), rounds, threads, clock, to, as_json
    )
    typer.echo(bench(asked, say))


@app.command(context_settings=OVERRIDES)
def step(
    context: typer.Context,
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="CFG",
            autocompletion=complete.configs,
            help="YAML file or recipe name: model, rows, optimizer. Any key can follow.",
        ),
    ] = None,
    device: DeviceOption = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", metavar="A,B", help="bf16, fp32. Both on a CPU, bf16 on a GPU.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="A,B", help="natural, grouped, full; natural-compiled, full-compiled."),
    ] = None,
    sparse_prediction: Annotated[
        bool, typer.Option("--sparse-prediction", help="ModernBERT computes the logits of labels only.")
    ] = False,
    steps: Annotated[
        int | None, typer.Option("--steps", metavar="N", min=1, help="Counted steps of a side in a round.")
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", min=1, help="Rounds at least.")] = 3,
    minutes: Annotated[float, typer.Option("--minutes", metavar="M", min=0, help="Time of all rounds.")] = 4,
    store: Annotated[
        Path | None, typer.Option("--store", metavar="DIR", help="Token store; Python's documentation by default.")
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option("--vocab-size", metavar="N", min=300, help="Tokens of the default store's tokenizer.")
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Show where the time of enc's step goes instead.")] = False,
    threads: ThreadsOption = None,
    clock: ClockOption = "wall",
    as_json: JsonOption = False,
    to: PageOption = None,
) -> None:
    """Measure training steps against Hugging Face's Trainer: useful tokens a second, MFU, memory."""
    if config is not None and "=" in config:  # no config, and this is the first key
        context.args.insert(0, config)
        config = None
    overrides = overrides_among(context)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from enc.tools.bench.step import ask, bench

    asked = ask(
        device, overrides, config=config, dtypes=_words(dtype), against=_words(against),
        sparse_prediction=sparse_prediction, threads=threads, clock=clock, steps=steps, min_rounds=rounds,
        minutes=minutes, store=store, vocab_size=vocab_size, profile=profile, to=to, as_json=as_json,
    )  # fmt: skip
    typer.echo(bench(asked, say))
