"""`enc store`: look into a token store, and at how well its tokenizer suits a text."""

import json
import os
from typing import Annotated, Any

import typer

from enc.launcher.cli.options import JsonOption

app = typer.Typer(help="Look into a token store.", no_args_is_help=True)
_BAR = 24  # characters of the longest bar of a histogram

StoreArgument = Annotated[str, typer.Argument(metavar="STORE", help="Token store (`enc preprocess` prints it).")]


@app.command("inspect")
def inspect(
    store: StoreArgument,
    samples: Annotated[int, typer.Option("--samples", min=0, metavar="N", help="Documents of a split to show.")] = 3,
    as_json: JsonOption = False,
) -> None:
    """Documents, tokens, lengths, unknown and repeated text, and a few documents."""
    from enc.encoder.data.inspect_store import inspect_store

    found = inspect_store(store, samples)
    typer.echo(json.dumps(found, indent=1, ensure_ascii=False) if as_json else "\n".join(_lines(found)))


@app.command("tokenizer")
def tokenizer(
    store: StoreArgument,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="File, folder or glob of text that it has not seen.")],
    against: Annotated[
        list[str] | None,
        typer.Option("--against", metavar="NAME", help="Another tokenizer: a folder, or a hub name in the cache."),
    ] = None,
    documents: Annotated[int, typer.Option("--documents", min=1, metavar="N", help="Read so many.")] = 2000,
    as_json: JsonOption = False,
) -> None:
    """Compare what a store's tokenizer makes of a text with what others make of it. Nothing is downloaded."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's client
    from enc.encoder.data.store import TokenStore
    from enc.encoder.data.tokenizer import EncoderTokenizer
    from enc.encoder.data.tokenizer_report import compare_tokenizers, text_sample

    own = EncoderTokenizer.load(TokenStore.open(store).tokenizer_dir)
    rows = compare_tokenizers(own, against or [], text_sample(text, documents))
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    typer.echo("\n\n".join(_about_tokenizer(row) for row in rows))


def _about_tokenizer(row: dict[str, Any]) -> str:
    from enc.encoder.text_table import table

    if "missing" in row:
        return table([("tokenizer", row["tokenizer"]), ("", row["missing"])])
    return table(
        [
            (
                "tokenizer",
                f"{row['tokenizer']}, {row['vocabulary']:,} tokens, {row['used_share_of_vocabulary']:.1%} used",
            ),
            ("text", f"{row['tokens']:,} tokens, {row['tokens_per_word']:.2f} a word"),
            ("a token", f"{row['characters_per_token']:.2f} characters, {row['bytes_per_token']:.2f} bytes"),
            ("unknown", f"{row['unknown_share']:.2%} of the tokens; {row['unknown_documents']:,} documents whole"),
        ]
    )


def _lines(found: dict[str, Any]) -> list[str]:
    from enc.encoder.data.notes import source_notes
    from enc.encoder.text_table import table

    source, made = found["source"], found["tokenizer"]
    head = [
        ("store", found["store"]),
        ("made from", f"{source['location']} ({source['kind']})"),
        *(("", note) for note in source_notes(found["sources"])),
        ("tokenizer", f"{made['name']}, {made['num_tokens']:,} tokens"),
        ("fingerprint", found["fingerprint"]),
    ]
    if bad := found["bad_rows"]:
        head.append(("left out", f"{bad['number']:,} rows that cannot be read; the first: {bad['first']}"))
    parts = [table(head), *(_split_text(name, split) for name, split in found["splits"].items())]
    return "\n\n".join(parts).split("\n")


def _split_text(name: str, split: dict[str, Any]) -> str:
    from enc.encoder.text_table import table

    documents, tokens, lengths = split["documents"], split["tokens"], split["lengths"]
    per_token = split["characters_per_token"]
    lines = [
        (name, f"{documents:,} documents, {tokens:,} tokens"),
        ("lengths", f"{lengths['shortest']:,} to {lengths['longest']:,} tokens, median {lengths['median']:,.0f}, "
                    f"mean {lengths['mean']:,.1f}"),
        ("a token", f"{per_token:.2f} characters" if per_token else "characters were not counted by that version"),
        ("unknown", f"{split['unknown_tokens'] / tokens:.2%} of the tokens; {split['unknown_documents']:,} documents "
                    "whole"),
        ("repeated", f"{split['repeated_documents']:,} documents ({split['repeated_documents'] / documents:.1%})"),
    ]  # fmt: skip
    if split["also_in_train"] is not None:
        lines.append(("in train", f"{split['also_in_train']:,} documents ({split['also_in_train'] / documents:.1%})"))
    return "\n".join([table(lines), "", *_histogram(lengths["histogram"], documents, tokens), *_samples(split)])


def _histogram(classes: list[dict[str, int]], documents: int, tokens: int) -> list[str]:
    most = max(c["documents"] for c in classes)
    rows = [
        (f"{c['from']:,}-{c['to']:,}" if c["to"] > c["from"] else f"{c['from']}", c["documents"], c["tokens"])
        for c in classes
    ]
    width = max(6, *(len(label) for label, _, _ in rows))
    head = f"  {'tokens':>{width}}  {'':{_BAR}}  {'documents':>10}  of tokens"
    bars = ["▇" * round(_BAR * number / most) for _, number, _ in rows]
    return [head] + [
        f"  {label:>{width}}  {bar:{_BAR}}  {number / documents:>10.1%}  {size / tokens:>9.1%}"
        for bar, (label, number, size) in zip(bars, rows, strict=True)
    ]


def _samples(split: dict[str, Any]) -> list[str]:
    import textwrap

    from enc.encoder.printable import printable

    lines: list[str] = []
    for sample in split["samples"]:
        text = printable(" ".join(sample["text"].split()))
        lines += ["", f"  document {sample['document']:,}, {sample['tokens']:,} tokens:"]
        lines += textwrap.wrap(text, 76, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)
    return lines
