"""Text in, token store out: `enc preprocess`.

    this process: read_documents ─▶ chunks ─▶ workers (text → ids) ─▶ this process, in order: data file, progress log

Chunks are cut by size alone and written in order, so the bytes of a store depend neither on the number of workers nor
on how often the work was interrupted. Until it is complete a store is built in `<store>.partial/`: after a chunk's
bytes are in the data file, a line of `progress.jsonl` says how long the file now is and what the chunk's text and
bytes hash to. After a kill at any moment the files are cut back to the last line that holds, and the work goes on from
there.

Workers are fresh interpreters that run `worker_main` and talk over pipes. A fork would copy threads' locks, and
multiprocessing's spawn would import the caller's main module, with whatever it does, in each of them.
"""

import contextlib
import errno
import fcntl
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from enc.encoder.data import store
from enc.encoder.data.chunks import CHUNK_BYTES, FIRST_CHUNK_BYTES, Chunk, cut_chunks
from enc.encoder.data.config import DatasetConfig, TokenizerConfig
from enc.encoder.data.foreign_ids import stored_ids
from enc.encoder.data.manifest import check_matches
from enc.encoder.data.obtain import identity, obtain_tokenizer
from enc.encoder.data.sources.documents import read_documents, source_total
from enc.encoder.data.sources.find import held_out_sources, resolve_source, store_path
from enc.encoder.data.sources.source import HELD_OUT_FILES, Document, Source
from enc.encoder.data.sources.splits import train_split
from enc.encoder.data.sources.summary import content_digests, source_summary
from enc.encoder.data.store_writer import StoreWriter, Written
from enc.encoder.data.tokenizer import EncoderTokenizer
from enc.encoder.data.workers import WorkerPool
from enc.encoder.errors import RunError, UsageError
from enc.encoder.files import fsync_directory, read_json, write_json_safely

Progress = Callable[[int, int | None, int], None]


# --- what is asked for ------------------------------------------------------------------------------------------------
def wanted_request(dataset: DatasetConfig, tokenizer: TokenizerConfig, seed: int) -> dict[str, Any]:
    """Return what a store must have been made from to serve this config: `manifest.check_matches` compares it.

    If `dataset.path` is a token store, its source and settings were chosen when it was made: the tokenizer counts, and
    the sources that `validation_file` and `test_file` name now.

    Raises:
        UsageError: a local source or tokenizer does not exist.
    """
    source = resolve_source(dataset)
    held_out = held_out_sources(source, dataset)
    own = {key: held_out[split].describe() if split in held_out else {} for split, key in HELD_OUT_FILES.items()}
    if source.kind == "store":
        return {"tokenizer": identity(tokenizer)} | {key: wanted for key, wanted in own.items() if wanted}
    keys = (
        "config",
        "text_column",
        "text_unit",
        "min_text_length",
        "train_split",
        "eval_split",
        "validation_split",
        "eval_samples",
        "test_samples",
    )
    settings = {key: getattr(dataset, key) for key in keys}
    settings["train_split"] = train_split(source, dataset.train_split, dataset.eval_split)
    settings["seed"] = seed if dataset.validation_split else None  # nothing else is drawn
    return {"tokenizer": identity(tokenizer), "source": source.describe(), **own, "settings": settings}


# --- the command ------------------------------------------------------------------------------------------------------
def preprocess(
    dataset: DatasetConfig, tokenizer: TokenizerConfig, seed: int, on_progress: Progress | None = None
) -> Path:
    """Tokenise the text of a dataset section into a token store and return its path.

    A complete store that was made from the same things is reused; an interrupted one is continued. `on_progress` is
    called with (position in the source, its total or None, tokens so far) whenever a chunk is written;
    `corpus.Source.unit` says what is counted.

    Raises:
        UsageError: a bad source, tokenizer or target, another preprocess at work, or a store made from other things.
        RunError: it failed on the way (full disk, a killed worker); running it again goes on from there.
    """
    return made_store(dataset, tokenizer, seed, on_progress).path


def made_store(
    dataset: DatasetConfig,
    tokenizer: TokenizerConfig,
    seed: int,
    on_progress: Progress | None = None,
    opened: store.TokenStore | None = None,
    pad_id: int = 0,
) -> store.TokenStore:
    """Do what `preprocess` does and return the store; `opened` is the one of this dataset if it was opened before.

    A tokenizer that is trained for it pads with `pad_id`. That is no part of what is asked for: a store that is there
    serves with whatever padding it has.
    """
    target, wanted = store_path(dataset), wanted_request(dataset, tokenizer, seed)
    if found := reusable(target, wanted, opened):
        return found
    try:
        with _lock(target):
            found = reusable(target, wanted)  # another process may have finished it while this one waited to look
            if found is None:
                show = on_progress or (lambda done, total, tokens: None)
                _build(target, wanted, dataset, tokenizer, seed, show, pad_id)
    except OSError as error:
        raise _write_error(target, error) from error
    return found or store.TokenStore.open(target)


def reusable(target: Path, wanted: dict[str, Any], opened: store.TokenStore | None = None) -> store.TokenStore | None:
    """Return the complete store at `target` that was made from what is wanted; every byte of it is read and compared.

    Raises:
        UsageError: something else is there: a store of another request, a damaged one, or another kind of folder.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return None
    opened = opened or store.TokenStore.open(target)
    check_matches(opened.manifest, wanted, target)
    return store.verify(opened)


def _write_error(target: Path, error: OSError) -> Exception:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        return RunError(
            f"Writing the token store {target} failed: {reason}. What was done is kept in {_partial(target)}: make "
            "room and run the same command again to go on, or delete that folder to give up."
        )
    return UsageError(
        f"Cannot write the token store {target}: {reason} ({error.filename or target}). Set "
        "dataset.pre_tokenize_output to a folder that can be written."
    )


def _partial(target: Path) -> Path:
    return target.with_name(f"{target.name}.partial")


@contextlib.contextmanager
def _lock(target: Path) -> Iterator[None]:
    """Hold `.<store>.lock` beside the store; the kernel lets go of it when the process ends in whatever way.

    A failure that leaves no work behind leaves no lock file and no new folder either.
    """
    created = [folder for folder in target.parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    path = target.with_name(f".{target.name}.lock")
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(file.fileno()), path.stat()):  # removed by a failure, then made anew
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError) as error:
            raise UsageError(
                f"Another preprocess is writing {target} (it holds {path}). Wait for it to finish, or set "
                "dataset.pre_tokenize_output to another folder."
            ) from error
        try:
            yield
        except BaseException:
            if not target.exists() and not _partial(target).exists():
                path.unlink()
                with contextlib.suppress(OSError):  # somebody else has put something there
                    for folder in created:
                        folder.rmdir()
            raise


def _build(
    target: Path,
    wanted: dict[str, Any],
    dataset: DatasetConfig,
    tokenizer_config: TokenizerConfig,
    seed: int,
    on_progress: Progress,
    pad_id: int,
) -> None:
    partial = _partial(target)
    if (partial / "manifest.json").exists():  # stopped between the last file and the rename
        check_matches(store.TokenStore.open(partial).manifest, wanted, partial)
    else:
        try:
            _fill(partial, wanted, dataset, tokenizer_config, seed, on_progress, pad_id)
        except UsageError:
            if not any(partial.glob("*/data-*")):  # it failed before there was anything worth keeping
                shutil.rmtree(partial, ignore_errors=True)
            raise
    for name in (StoreWriter.REQUEST, StoreWriter.LOG):
        (partial / name).unlink(missing_ok=True)
    fsync_directory(partial)
    partial.rename(target)
    fsync_directory(target.parent)


def _fill(
    partial: Path,
    wanted: dict[str, Any],
    dataset: DatasetConfig,
    tokenizer_config: TokenizerConfig,
    seed: int,
    on_progress: Progress,
    pad_id: int,
) -> None:
    source = resolve_source(dataset)
    total = source_total(source, dataset)
    tokenizer = _prepare(partial, wanted, source, dataset, tokenizer_config, seed, pad_id)
    writer = StoreWriter(partial, store.token_dtype(tokenizer.num_tokens), tokenizer.unknown_id)
    bad_rows = _BadRows()
    with contextlib.closing(writer):
        documents = read_documents(source, dataset, seed, bad_rows.count)
        chunks = cut_chunks(documents, FIRST_CHUNK_BYTES, CHUNK_BYTES)
        _tokenise(
            chunks,
            writer,
            tokenizer,
            partial / "tokenizer",
            dataset.num_proc,
            lambda done, tokens: on_progress(done, total, tokens),
        )
        content = {key: content_digests(wanted[key]) for key in ("source", *HELD_OUT_FILES.values()) if wanted.get(key)}
        about_text = {"sources": source_summary(source, dataset), "content": content, **bad_rows.described()}
        writer.finish(wanted, tokenizer, about_text)


class _BadRows:
    """How many rows were left out, and why the first one was."""

    def __init__(self) -> None:
        self._number, self._first = 0, ""

    def count(self, reason: str) -> None:
        self._first = self._first or reason
        self._number += 1

    def described(self) -> dict[str, Any]:
        return {"bad_rows": {"number": self._number, "first": self._first}} if self._number else {}


def _prepare(
    partial: Path,
    wanted: dict[str, Any],
    source: Source,
    dataset: DatasetConfig,
    tokenizer_config: TokenizerConfig,
    seed: int,
    pad_id: int,
) -> EncoderTokenizer:
    """Make the partial folder, or check that the one there was begun for the same request; return the tokenizer."""
    request = partial / StoreWriter.REQUEST
    if request.exists():
        check_matches({"request": _without_files(read_json(request))}, _without_files(wanted), partial)
        write_json_safely(request, wanted)
        return EncoderTokenizer.load(partial / "tokenizer")
    if partial.exists():  # killed before the request was written: nothing is in it but a piece of a tokenizer
        shutil.rmtree(partial)
    partial.mkdir()

    def read_texts() -> Iterator[str]:
        return (_text_of(document) for document in read_documents(source, dataset, seed) if document.split == "train")

    tokenizer = obtain_tokenizer(tokenizer_config, read_texts, pad_id)
    tokenizer.save(partial / "tokenizer")
    write_json_safely(partial / "tokenizer_info.json", tokenizer.info())
    write_json_safely(request, wanted)
    return EncoderTokenizer.load(partial / "tokenizer")  # as every later reader sees it


def _text_of(document: Document) -> str:
    if isinstance(document.text, str):
        return document.text
    raise UsageError(
        "The source holds ids of tokens, which no tokenizer can be trained on. Set tokenizer.train=null, and "
        "tokenizer.path or tokenizer.name to the tokenizer that made them."
    )


def _without_files(request: dict[str, Any]) -> dict[str, Any]:
    """Return a request whose files need not be those of before: chunk by chunk it shows whether the text is the same.

    Only a tokenizer that was trained on all of the text has to be trained again when a file has changed.
    """
    if "train" in request["tokenizer"]:
        return request
    kinds = {key: {"kind": request[key]["kind"]} for key in ("source", *HELD_OUT_FILES.values()) if request.get(key)}
    return request | kinds


# --- workers ----------------------------------------------------------------------------------------------------------
def _tokenise(
    chunks: Iterable[Chunk],
    writer: StoreWriter,
    tokenizer: EncoderTokenizer,
    tokenizer_dir: Path,
    num_proc: int,
    report: Callable[[int, int], None],
) -> None:
    """Send the chunks that are not written yet to workers, and write the results in the order of the chunks."""
    done = iter(list(writer.done))
    cores = _num_cores()
    num_workers = min(num_proc or cores, cores)
    pending: deque[tuple[Chunk, Future[tuple[np.ndarray, np.ndarray]]]] = deque()

    def write_next() -> None:
        chunk, future = pending.popleft()
        writer.append(chunk, *future.result())
        report(chunk.position, writer.tokens)

    with WorkerPool(tokenizer_dir, num_workers) as pool:
        for chunk in chunks:
            if (line := next(done, None)) is not None:
                _check_unchanged(chunk, line, tokenizer_dir.parent)
                report(chunk.position, writer.tokens)
                continue
            pending.append((chunk, _submit(chunk, pool, tokenizer)))
            while len(pending) > 2 * num_workers or (pending and pending[0][1].done()):
                write_next()
        while pending:
            write_next()
    if next(done, None) is not None:
        raise _changed(tokenizer_dir.parent)


def _submit(chunk: Chunk, pool: WorkerPool, tokenizer: EncoderTokenizer) -> Future[tuple[np.ndarray, np.ndarray]]:
    if not chunk.holds_ids:
        return pool.submit(chunk.texts)
    done: Future[tuple[np.ndarray, np.ndarray]] = Future()
    done.set_result(stored_ids(chunk, tokenizer, store.token_dtype(tokenizer.num_tokens)))
    return done


def _check_unchanged(chunk: Chunk, line: Written, partial: Path) -> None:
    if chunk.split != line.split or chunk.digest() != line.text:
        raise _changed(partial)


def _changed(partial: Path) -> UsageError:
    return UsageError(
        f"The text is no longer what it was when {partial} was begun, so the work cannot go on. Delete {partial} to "
        f"start again."
    )


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
