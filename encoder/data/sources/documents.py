"""Where text comes from: every source becomes one stream of documents, each marked "train", "eval" or "test".

    dataset section ──resolve_source, held_out_sources──▶ Source (what is read: value, no text opened)
                    ──read_documents──▶ Document, Document, …  (in one fixed order, a document at a time)

A source is a file, a folder or a glob of text, JSON lines, CSV and Parquet files, or a list of these; a folder written
by `datasets.save_to_disk`; a dataset of the Hugging Face hub; or `python-docs`, the documentation inside the running
Python, which needs no network. Neither torch, transformers nor (for local files) datasets is imported here.
"""

import sys
from collections.abc import Callable, Iterable, Iterator

from enc.encoder.data.config import DatasetConfig
from enc.encoder.data.sources.files import read_files
from enc.encoder.data.sources.find import held_out_sources
from enc.encoder.data.sources.python_docs import python_docs
from enc.encoder.data.sources.source import HELD_OUT_FILES, SPLITS, BadRow, Document, Row, Source, Text, Tokens
from enc.encoder.data.sources.splits import ALL_FILES, refuse_splits, split_files
from enc.encoder.data.sources.tables import arrow_split, hub_split, read_table
from enc.encoder.errors import UsageError

OnSkip = Callable[[str], None]  # is told of each row that is left out, and why
SPLIT_BLOCK = 4096  # documents that share one keyed generator: seeding one for each document costs more than reading it


def read_documents(
    source: Source, dataset: DatasetConfig, seed: int, on_skip: OnSkip = lambda reason: None
) -> Iterator[Document]:
    """Yield the usable documents of a source and of `held_out_sources`, each with its split, always in the same order.

    Sources of their own come first, so that what is wrong with them shows before hours of work. Which documents of
    `source` are held out for evaluation is decided by the first of these that is set: `eval_split` (a split of the
    source), `validation_split` (a fraction, drawn by (seed, "split", index of the document)), `eval_samples` (that many
    from the head). `eval_samples` also caps an evaluation set chosen in another way. The `test_samples` documents that
    follow are held out for the test. At least one document always stays in train. Rows that cannot be read are left out
    and told to `on_skip` where `on_bad_row` says so.

    Raises:
        UsageError: nothing usable in a split, a missing column or split, or a row that cannot be read.
    """
    start = 0
    for split, held_out in held_out_sources(source, dataset).items():
        count = 0
        for text, position in _usable(_open_whole(held_out, dataset), dataset, on_skip):
            count += 1
            yield Document(split, text, start + position)
        if not count:
            raise UsageError(
                f"dataset.{HELD_OUT_FILES[split]}: no usable document in {held_out.place}: it is empty, or every text "
                f"is shorter than dataset.min_text_length={dataset.min_text_length}. Name another text."
            )
        start += held_out.total_bytes or 0
    counts = dict.fromkeys(SPLITS, 0)
    for split, text, position in _assign_splits(source, dataset, seed, on_skip):
        counts[split] += 1
        yield Document(split, text, start + position)
    _check_counts(counts, source, dataset)


def _check_counts(counts: dict[str, int], source: Source, dataset: DatasetConfig) -> None:
    if not counts["train"]:
        raise UsageError(
            f"No usable document for training in {source.place}: it is empty, or every text is shorter than "
            f"dataset.min_text_length={dataset.min_text_length} or was held out. Lower min_text_length or the "
            "evaluation share, or add text."
        )
    asked = {"eval": ("eval_split", "validation_split"), "test": ("test_samples",)}
    for split, keys in asked.items():
        setting = next((key for key in keys if getattr(dataset, key)), None)
        if setting and not counts[split]:
            other = ", or set dataset.eval_samples to reserve a fixed number" if split == "eval" else ""
            raise UsageError(
                f"dataset.{setting}={getattr(dataset, setting)} holds out none of the {sum(counts.values())} documents "
                f"of {source.place}. Choose another value{other}."
            )


def source_total(source: Source, dataset: DatasetConfig) -> int | None:
    """Return the last position that `read_documents` reaches, in `Source.unit`; None when only reading would tell."""
    sources = [source, *held_out_sources(source, dataset).values()]
    if any(part.kind != "files" for part in sources):
        return None
    return sum(part.total_bytes or 0 for part in sources)


def _assign_splits(source: Source, dataset: DatasetConfig, seed: int, on_skip: OnSkip) -> Iterator[Document]:
    rows = _open_split(source, dataset, dataset.train_split, held_out=dataset.eval_split)
    usable = _usable(rows, dataset, on_skip)
    cap = sys.maxsize if dataset.eval_samples is None else dataset.eval_samples
    num_test = dataset.test_samples or 0
    if dataset.eval_split:
        end = 0
        for document in _reserve_head(usable, 0, num_test):
            end = document.position
            yield document
        held_out = _usable(_open_split(source, dataset, dataset.eval_split), dataset, on_skip)
        for index, (text, position) in enumerate(held_out):
            if index >= cap:
                return
            yield Document("eval", text, end + position)
    elif dataset.validation_split:
        yield from _draw_split(usable, dataset.validation_split, cap, num_test, seed)
    else:
        yield from _reserve_head(usable, dataset.eval_samples or 0, num_test)


def _draw_split(
    texts: Iterable[Text | Tokens], fraction: float, cap: int, num_test: int, seed: int
) -> Iterator[Document]:
    from enc.encoder.keyed import numpy_rng  # imports torch, which no other way of splitting needs

    num_eval = 0
    for index, (text, position) in enumerate(texts):
        block, row = divmod(index, SPLIT_BLOCK)
        if row == 0:
            held_out = numpy_rng(seed, "split", block).random(SPLIT_BLOCK) < fraction
        if index < num_test:
            yield Document("test", text, position)
            continue
        is_eval = bool(held_out[row]) and num_eval < cap
        num_eval += is_eval
        yield Document("eval" if is_eval else "train", text, position)


def _reserve_head(texts: Iterable[Text | Tokens], num_eval: int, num_test: int) -> Iterator[Document]:
    """Hold out the first documents, but never the last one: it is read one ahead to know which that is."""
    pending: Text | Tokens | None = None
    index = 0
    for text in texts:
        if pending is not None:
            split = "eval" if index < num_eval else "test" if index < num_eval + num_test else "train"
            yield Document(split, *pending)
            index += 1
        pending = text
    if pending is not None:
        yield Document("train", *pending)


def _usable(rows: Iterable[Row], dataset: DatasetConfig, on_skip: OnSkip) -> Iterator[Text | Tokens]:
    """Leave out what has fewer than `min_text_length` characters between its outer white space, and bad rows.

    Ids have no characters: all of these documents are usable.
    """
    shortest = dataset.min_text_length
    for row in rows:
        if isinstance(row, BadRow):
            if dataset.on_bad_row == "error":
                raise UsageError(f"{row.reason} To leave out and count such rows, set dataset.on_bad_row=skip.")
            on_skip(row.reason)
        elif isinstance(row, Tokens) or (len(row.text) >= shortest and len(row.text.strip()) >= shortest):
            yield row


def _open_whole(source: Source, dataset: DatasetConfig) -> Iterator[Row]:
    """Read a source of held-out text, in which the names of files say nothing."""
    return _open_split(source, dataset, ALL_FILES if source.kind == "files" else None)


def _open_split(
    source: Source, dataset: DatasetConfig, split: str | None, held_out: str | None = None
) -> Iterator[Row]:
    if source.kind == "files":
        return read_files(source, split_files(source, split, held_out), dataset)
    if source.kind == "arrow":
        return read_table(arrow_split(source.location, split), dataset, source.location)
    if source.kind == "hub":
        return read_table(hub_split(source.location, dataset, split or "train"), dataset, source.location)
    if source.kind == "python-docs":
        refuse_splits(source, split or held_out)
        return (Text(text, index + 1) for index, text in enumerate(python_docs()))
    raise UsageError(
        f"{source.location} is a token store, which holds no text to read. Give dataset.path a text source."
    )
