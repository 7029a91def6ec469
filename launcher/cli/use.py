"""`enc fill-mask` and `enc encode`: using what was trained."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from enc.launcher.cli.ckpt import checkpoint_folder
from enc.launcher.cli.options import JsonOption, checkpoint_argument, say

if TYPE_CHECKING:
    from enc.tools.fill_mask import Gap
    from enc.tools.trained import Trained

RunArgument = Annotated[
    str,
    checkpoint_argument("RUN", "Run folder (its latest checkpoint), RUN/best, or a checkpoint folder."),
]


def fill_mask(
    run: RunArgument,
    text: Annotated[
        str | None, typer.Argument(metavar="TEXT", help="Text with [MASK] in it; by default held-out ones are drawn.")
    ] = None,
    top: Annotated[int, typer.Option("--top", metavar="N", min=1, help="Guesses for a gap.")] = 5,
    count: Annotated[int, typer.Option("--count", metavar="N", min=1, help="Texts that are drawn.")] = 5,
    as_json: JsonOption = False,
) -> None:
    """Show what a trained model guesses for hidden words, with probabilities."""
    from enc.tools.fill_mask import fill, fill_held_out

    trained = _trained(run)
    gaps = fill_held_out(trained, count, top) if text is None else fill(trained, text, top)
    if as_json:
        rows = [{"text": gap.text, "word": gap.word, "guesses": gap.guesses} for gap in gaps]
        typer.echo(json.dumps(rows, ensure_ascii=False))
        return
    typer.echo("\n\n".join(_shown(gap) for gap in gaps))


def _shown(gap: "Gap") -> str:
    guesses = ", ".join(f"{word} {chance:.1%}" for word, chance in gap.guesses)
    was = [] if gap.word is None else [f"    was: {gap.word}"]
    return "\n".join([gap.text, *was, f"    guessed: {guesses}"])


def encode(
    run: RunArgument,
    file: Annotated[str, typer.Argument(metavar="FILE", help="Text in UTF-8, a document a line.")],
    out: Annotated[
        str | None, typer.Option("--out", metavar="PATH", help="New .npy or .parquet; by default FILE with .npy.")
    ] = None,
) -> None:
    """Write the vector of each line of a file, the mean of its hidden states; print the file's path.

    The vectors are those of an export with --sentence-transformers, but that long texts are read to their end.
    """
    from enc.tools.encode import encode_file, refuse_files

    place = Path(out) if out else Path(file).with_suffix(".npy")
    refuse_files(Path(file), place)
    num_texts, size = encode_file(_trained(run), Path(file), place)
    say(f"Wrote {num_texts:,} vectors of {size} numbers.")
    typer.echo(str(place))


def _trained(run: str) -> "Trained":
    folder = checkpoint_folder(run)
    from enc.tools.trained import Trained  # brings torch along

    return Trained.load(folder)
