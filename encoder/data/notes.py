"""What a person should be told of a source and of a token store. Pure, and light."""

from collections.abc import Iterator
from typing import Any

from enc.encoder.quantities import size_text

UNKNOWN_SHARE = 0.01  # from which on unknown tokens are warned of


def source_notes(summary: dict[str, Any]) -> Iterator[str]:
    """Say what of a source is read and what is left out (`source_summary`)."""
    if read := summary.get("read"):
        endings = ", ".join(f"{count['files']:,} {ending}" for ending, count in read.items())
        yield f"Text of {_total(read)}: {endings}."
    if left_out := summary.get("left_out"):
        reasons = "; ".join(
            f"{_total({reason: count})} {reason} ({_some(count)})" for reason, count in left_out.items()
        )
        yield f"Left out: {reasons}."


def store_notes(manifest: dict[str, Any]) -> Iterator[str]:
    """Say what is wrong with the text of a store: rows that were left out, text that the tokenizer does not know."""
    if bad := manifest.get("bad_rows"):
        yield f"Left out: {bad['number']:,} rows that cannot be read. The first: {bad['first']}"
    for split, statistics in manifest.get("statistics", {}).items():
        totals = manifest["splits"][split]
        tokens = statistics["unknown_tokens"] / totals["tokens"]
        documents = statistics["unknown_documents"] / totals["documents"]
        if max(tokens, documents) > UNKNOWN_SHARE:
            yield (
                f"Warning: the tokenizer does not know {tokens:.1%} of the tokens of {split}, and no token of "
                f"{documents:.1%} of its documents. Nothing is learnt from them. {_remedy(manifest['request'])}"
            )


def ignored_settings(manifest: dict[str, Any], settings: dict[str, Any]) -> Iterator[str]:
    """Say which settings of a config have no effect on a store that is named itself, and was made with others.

    `settings` are those that are not the defaults.
    """
    made_with = manifest["request"]["settings"]
    for key, value in settings.items():
        if key in made_with and made_with[key] != value:
            was = made_with[key]
            yield f"Note: dataset.{key}={value} has no effect on a finished token store; it was made with {was}."


def _remedy(request: dict[str, Any]) -> str:
    train = request["tokenizer"].get("train")
    if train is None:
        return "Choose a tokenizer that was made for such text, or train one with tokenizer.train.model=bpe."
    return (
        "Set tokenizer.train.model=bpe, which knows every text, or raise tokenizer.train.vocab_size, limit_alphabet "
        "(characters that it knows) and max_input_chars_per_word (longer words are unknown)."
    )


def _total(counts: dict[str, Any]) -> str:
    files = sum(count["files"] for count in counts.values())
    return f"{files:,} file{'s' * (files != 1)}, {size_text(sum(count['bytes'] for count in counts.values()))}"


def _some(count: dict[str, Any]) -> str:
    return f"{count['first']}{', …' if count['files'] > 1 else ''}"
