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

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import pickle
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np
import xxhash

from enc.encoder.data import corpus, store
from enc.encoder.data.tokenizer import DocumentEncoder, EncoderTokenizer, identity, obtain_tokenizer
from enc.encoder.errors import RunError, UsageError
from enc.encoder.files import file_checksum, fsync_directory

if TYPE_CHECKING:
    from enc.encoder.data.config import DatasetConfig, TokenizerConfig

Progress = Callable[[int, int | None, int], None]

CHUNK_BYTES = 4 * 2**20  # UTF-8 bytes of text that go to a worker at once and become one record batch
FIRST_CHUNK_BYTES = 2**18  # chunks grow to the full size, so that small corpora are shared out evenly too
LENGTH = struct.Struct("<Q")


# -------------------------------------------------------------------------------------------------- what is asked for


def store_path(dataset: DatasetConfig) -> Path:
    """Return where the tokens of a dataset section are or will be, without reading any text.

    That is `path` itself if it is a token store, else `pre_tokenize_output`, else `tokenized_data/<name>` (with the
    hub config's name).
    """
    if dataset.path and corpus.is_store(Path(dataset.path).expanduser()):
        return Path(dataset.path).expanduser()
    if dataset.pre_tokenize_output:
        return Path(dataset.pre_tokenize_output).expanduser()
    name = Path(dataset.path).name if dataset.path else "-".join(filter(None, [dataset.name, dataset.config]))
    return Path("tokenized_data") / (re.sub(r"[^\w.+-]+", "-", name).strip("-.") or "corpus")


def wanted_request(dataset: DatasetConfig, tokenizer: TokenizerConfig, seed: int) -> dict[str, Any]:
    """Return what a store must have been made from to serve this config: `store.check_matches` compares it.

    If `dataset.path` is a token store, its source and settings were chosen when it was made: the tokenizer counts, and
    the sources that `validation_file` and `test_file` name now.

    Raises:
        UsageError: a local source or tokenizer does not exist.
    """
    source = corpus.resolve_source(dataset)
    held_out = corpus.held_out_sources(source, dataset)
    own = {key: held_out[split].describe() if split in held_out else {} for split, key in corpus.HELD_OUT_FILES.items()}
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
    settings["seed"] = seed if dataset.validation_split else None  # nothing else is drawn
    return {"tokenizer": identity(tokenizer), "source": source.describe(), **own, "settings": settings}


# -------------------------------------------------------------------------------------------------------- the command


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
    target, wanted = store_path(dataset), wanted_request(dataset, tokenizer, seed)
    if reusable(target, wanted):
        return target
    try:
        with _lock(target):
            if not reusable(target, wanted):  # another process may have finished it while this one waited to look
                _build(target, wanted, dataset, tokenizer, seed, on_progress or (lambda done, total, tokens: None))
    except OSError as error:
        raise _write_error(target, error) from error
    return target


def reusable(target: Path, wanted: dict[str, Any]) -> bool:
    """Return whether a complete store is at `target`, made from what is wanted; every byte of it is read and compared.

    Raises:
        UsageError: something else is there: a store of another request, a damaged one, or another kind of folder.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    store.check_matches(store.TokenStore.open(target).manifest, wanted, target)
    store.verify(target)
    return True


def _write_error(target: Path, error: OSError) -> Exception:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        return RunError(
            f"Writing the token store {target} failed: {reason}. What was done is kept in {_partial(target)}: make "
            f"room and "
            "run the same command again to go on, or delete that folder to give up."
        )
    return UsageError(
        f"Cannot write the token store {target}: {reason} ({error.filename or target}). Set "
        f"dataset.pre_tokenize_output to a "
        "folder that can be written."
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
) -> None:
    partial = _partial(target)
    if (partial / "manifest.json").exists():  # stopped between the last file and the rename
        store.check_matches(store.TokenStore.open(partial).manifest, wanted, partial)
    else:
        try:
            _fill(partial, wanted, dataset, tokenizer_config, seed, on_progress)
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
) -> None:
    source = corpus.resolve_source(dataset)
    total = corpus.source_total(source, dataset)
    tokenizer = _prepare(partial, wanted, source, dataset, tokenizer_config, seed)
    writer = StoreWriter(partial, store.token_dtype(tokenizer.num_tokens))
    with contextlib.closing(writer):
        chunks = cut_chunks(corpus.read_documents(source, dataset, seed), FIRST_CHUNK_BYTES, CHUNK_BYTES)
        _tokenise(
            chunks,
            writer,
            partial / "tokenizer",
            dataset.num_proc,
            lambda done, tokens: on_progress(done, total, tokens),
        )
        writer.finish(wanted, tokenizer)


def _prepare(
    partial: Path,
    wanted: dict[str, Any],
    source: corpus.Source,
    dataset: DatasetConfig,
    tokenizer_config: TokenizerConfig,
    seed: int,
) -> EncoderTokenizer:
    """Make the partial folder, or check that the one there was begun for the same request; return the tokenizer."""
    request = partial / StoreWriter.REQUEST
    if request.exists():
        store.check_matches({"request": json.loads(request.read_text(encoding="utf-8"))}, wanted, partial)
        return EncoderTokenizer.load(partial / "tokenizer")
    if partial.exists():  # killed before the request was written: nothing is in it but a piece of a tokenizer
        shutil.rmtree(partial)
    partial.mkdir()

    def read_texts() -> Iterator[str]:
        return (document.text for document in corpus.read_documents(source, dataset, seed) if document.split == "train")

    tokenizer = obtain_tokenizer(tokenizer_config, read_texts)
    tokenizer.save(partial / "tokenizer")
    store.write_json(partial / "tokenizer_info.json", tokenizer.info())
    store.write_json(request, wanted)
    return EncoderTokenizer.load(partial / "tokenizer")  # as every later reader sees it


# ------------------------------------------------------------------------------------------------------------- chunks


@dataclass
class Chunk:
    """Consecutive documents of one split, as UTF-8, and the position in the source after the last of them."""

    split: str
    texts: list[bytes] = field(default_factory=list)
    num_bytes: int = 0
    position: int = 0

    def digest(self) -> str:
        """Return the xxh3_64 of the texts, by which a resumed run knows that the source is still the same."""
        digest = xxhash.xxh3_64()
        for text in self.texts:
            digest.update(LENGTH.pack(len(text)))
            digest.update(text)
        return digest.hexdigest()


def cut_chunks(documents: Iterable[corpus.Document], first_bytes: int, full_bytes: int) -> Iterator[Chunk]:
    """Gather documents into chunks of one split each, by their size alone; what is left over comes last."""
    size = first_bytes
    open_chunks: dict[str, Chunk] = {}
    for split, text, position in documents:
        chunk = open_chunks.setdefault(split, Chunk(split))
        encoded = text.encode()
        chunk.texts.append(encoded)
        chunk.num_bytes += len(encoded)
        chunk.position = position
        if chunk.num_bytes >= size:
            yield open_chunks.pop(split)
            size = min(size + first_bytes // 2, full_bytes)
    yield from (open_chunks[split] for split in corpus.SPLITS if split in open_chunks)


# ------------------------------------------------------------------------------------------------------------ writing


@dataclass(frozen=True)
class Written:
    """A line of the progress log: one chunk that is in a data file, from byte `start` to byte `end`."""

    split: str
    shard: int
    start: int
    end: int
    documents: int
    tokens: int
    text: str  # digest of the chunk's text
    data: str  # digest of the bytes in the data file


class StoreWriter:
    """Appends chunks to the data files of an unfinished store, and takes up one that was left at any moment."""

    REQUEST = "request.json"
    LOG = "progress.jsonl"

    def __init__(self, folder: Path, dtype: np.dtype) -> None:
        self._folder = folder
        self._dtype = dtype
        self._header = bytes(store.arrow_schema(dtype).serialize())
        self.tokens = 0
        self._shards: dict[str, int] = {}
        self._files: dict[str, BinaryIO] = {}
        self._digests: dict[str, Any] = {}  # data file -> running xxh3_64 of all its bytes
        self._sizes: dict[str, int] = {}
        self._totals: dict[str, dict[str, int]] = {}
        self.done = self._recover()
        self._log = (folder / self.LOG).open("ab", buffering=0)

    def _recover(self) -> list[Written]:
        """Keep the longest beginning of the log whose bytes are really in the data files; cut off what comes after."""
        done: list[Written] = []
        for line in _read_log(self._folder / self.LOG):
            data = self._read_back(line)
            if data is None or xxhash.xxh3_64_hexdigest(data) != line.data:
                break
            self._account(line, data)
            done.append(line)
        for path in self._folder.glob("*/data-*.arrow"):
            name = path.relative_to(self._folder).as_posix()
            os.truncate(path, self._sizes[name]) if name in self._sizes else path.unlink()
        log = "".join(json.dumps(asdict(line)) + "\n" for line in done)
        _replace(self._folder / self.LOG, log.encode())
        return done

    def _read_back(self, line: Written) -> bytes | None:
        name = store.data_file_name(line.split, line.shard)
        if line.start != self._sizes.get(name, len(self._header)):
            return None
        try:
            with (self._folder / name).open("rb") as file:
                if line.start == len(self._header) and file.read(line.start) != self._header:
                    return None
                file.seek(line.start)
                return file.read(line.end - line.start)
        except OSError:
            return None

    def append(self, chunk: Chunk, lengths: np.ndarray, ids: np.ndarray) -> None:
        """Write one chunk's documents, lengths int32 (N,) and ids (sum of lengths,), and then its line of the log."""
        data = memoryview(store.record_batch_bytes(lengths, ids))
        shard = self._shards.get(chunk.split, 0)
        if self._sizes.get(store.data_file_name(chunk.split, shard), 0) >= store.SHARD_BYTES:
            self._close(chunk.split)
            shard += 1
        name = store.data_file_name(chunk.split, shard)
        file = self._open(chunk.split, name)
        start = self._sizes.get(name, len(self._header))
        _write_all(file, data)
        line = Written(
            chunk.split,
            shard,
            start,
            start + len(data),
            len(lengths),
            len(ids),
            chunk.digest(),
            xxhash.xxh3_64_hexdigest(data),
        )
        _write_all(self._log, memoryview(json.dumps(asdict(line)).encode() + b"\n"))
        self._account(line, data)

    def _account(self, line: Written, data: bytes | memoryview) -> None:
        name = store.data_file_name(line.split, line.shard)
        if name not in self._digests:
            self._digests[name] = xxhash.xxh3_64(self._header)
        self._digests[name].update(data)
        self._sizes[name] = line.end
        self._shards[line.split] = line.shard
        totals = self._totals.setdefault(line.split, {"documents": 0, "tokens": 0})
        totals["documents"] += line.documents
        totals["tokens"] += line.tokens
        self.tokens += line.tokens

    def _open(self, split: str, name: str) -> BinaryIO:
        if split not in self._files:
            path = self._folder / name
            path.parent.mkdir(exist_ok=True)
            file = path.open("ab", buffering=0)
            if file.tell() == 0:
                _write_all(file, memoryview(self._header))
            self._files[split] = cast(BinaryIO, file)
        return self._files[split]

    def _close(self, split: str) -> None:
        if split in self._files:
            os.fsync(self._files[split].fileno())
            self._files.pop(split).close()

    def _end(self, name: str) -> None:
        with (self._folder / name).open("ab") as file:
            file.write(store.END_OF_STREAM)
            file.flush()
            os.fsync(file.fileno())
        self._digests[name].update(store.END_OF_STREAM)
        self._sizes[name] += len(store.END_OF_STREAM)

    def close(self) -> None:
        """Let go of the files; what was appended stays."""
        for split in list(self._files):
            self._close(split)
        self._log.close()

    def finish(self, request: dict[str, Any], tokenizer: EncoderTokenizer) -> None:
        """Close the data files and write everything that makes the folder a store, the manifest last.

        Raises:
            UsageError: the tokenizer made nothing of all the text.
        """
        if not self._totals.get("train", {}).get("tokens"):
            raise UsageError(
                f"The tokenizer {tokenizer.name} makes no tokens of the text of {request['source']['location']}. "
                f"Check the source "
                "and the tokenizer."
            )
        self.close()
        for name in self._digests:
            self._end(name)
        splits = [split for split in corpus.SPLITS if split in self._shards]
        store.write_datasets_files(self._folder, {split: self._shards[split] + 1 for split in splits}, self._dtype)
        manifest = {
            "format": store.FORMAT,
            "version": store.VERSION,
            "request": request,
            "tokenizer": {
                "name": tokenizer.name,
                "fingerprint": tokenizer.fingerprint(),
                "num_tokens": tokenizer.num_tokens,
            },
            "splits": {split: self._totals[split] for split in splits},
            "files": {name: self._entry(name) for name in self._final_files()},
        }
        store.write_json(self._folder / "manifest.json", manifest)

    def _final_files(self) -> list[str]:
        names = (path.relative_to(self._folder).as_posix() for path in self._folder.rglob("*") if path.is_file())
        return sorted(
            name for name in names if name not in (self.REQUEST, self.LOG, "manifest.json") and "/." not in f"/{name}"
        )

    def _entry(self, name: str) -> dict[str, Any]:
        path = self._folder / name
        digest = self._digests[name].hexdigest() if name in self._digests else file_checksum(path)
        return {"bytes": self._sizes.get(name, path.stat().st_size), "xxh3_64": digest}


def _read_log(path: Path) -> Iterator[Written]:
    """Yield the lines of a progress log up to the first that is not whole."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return
    for line in lines:
        try:
            yield Written(**json.loads(line))
        except (ValueError, TypeError):
            return


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def _write_all(file: Any, data: memoryview) -> None:
    """Write everything: an unbuffered file may take less than it is given, at 2 GB or on a nearly full disk."""
    while data:
        data = data[file.write(data) :]


# ------------------------------------------------------------------------------------------------------------ workers


def _tokenise(
    chunks: Iterable[Chunk], writer: StoreWriter, tokenizer_dir: Path, num_proc: int, report: Callable[[int, int], None]
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
            pending.append((chunk, pool.submit(chunk.texts)))
            while len(pending) > 2 * num_workers or (pending and pending[0][1].done()):
                write_next()
        while pending:
            write_next()
    if next(done, None) is not None:
        raise _changed(tokenizer_dir.parent)


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


class WorkerPool:
    """Worker processes that turn texts into ids, fed by one thread each. Leaving the block ends them."""

    def __init__(self, tokenizer_dir: Path, num_workers: int) -> None:
        self._tokenizer_dir = tokenizer_dir
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="tokenise")
        self._processes: list[subprocess.Popen[bytes]] = []
        self._idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        self._num_workers = num_workers

    def __enter__(self) -> WorkerPool:
        for _ in range(self._num_workers):
            process = _start_worker(self._tokenizer_dir)
            self._processes.append(process)
            self._idle.put(process)
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._processes:
            process.kill()  # they hold nothing that could be lost
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(BrokenPipeError):
                    cast(BinaryIO, pipe).close()

    def submit(self, texts: list[bytes]) -> Future[tuple[np.ndarray, np.ndarray]]:
        """Return a future of (lengths int32 (N,), ids (sum of lengths,)) of these UTF-8 texts."""
        return self._threads.submit(self._encode, texts)

    def _encode(self, texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        process = self._idle.get()
        try:
            _send(cast(BinaryIO, process.stdin), texts)
            answer = _receive(cast(BinaryIO, process.stdout))
        except (OSError, EOFError) as error:
            code = process.wait()  # whoever takes this process next fails in the same way
            how = (
                f"was killed by signal {-code} ({signal.Signals(-code).name})"
                if code < 0
                else f"ended with code {code}"
            )
            raise RunError(
                f"A tokenising process {how}; a kill usually means that memory ran out. Run the same command again to "
                f"go on from "
                "here, with a smaller dataset.num_proc if it was memory."
            ) from error
        finally:
            self._idle.put(process)
        if isinstance(answer, str):
            raise RunError(f"The tokenizer failed on a text: {answer}.")
        return answer


def _start_worker(tokenizer_dir: Path) -> subprocess.Popen[bytes]:
    one_thread = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    # -P: nothing in the working directory may stand in for an installed package
    code = "import sys; from enc.encoder.data.preprocess import worker_main; worker_main(sys.argv[1])"
    command = [sys.executable, "-P", "-c", code, str(tokenizer_dir.absolute())]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **one_thread})


def _send(pipe: BinaryIO, message: Any) -> None:
    data = pickle.dumps(message, protocol=5)
    pipe.write(LENGTH.pack(len(data)))
    pipe.write(data)
    pipe.flush()


def _receive(pipe: BinaryIO) -> Any:
    """Return the next message; between these two processes, which are one program, pickle is safe."""
    header = pipe.read(LENGTH.size)
    if len(header) < LENGTH.size:
        raise EOFError
    (length,) = LENGTH.unpack(header)
    data = pipe.read(length)
    if len(data) < length:
        raise EOFError
    return pickle.loads(data)


def worker_main(tokenizer_dir: str) -> None:
    """Run a worker process: read lists of UTF-8 texts from stdin, write (lengths, ids) to stdout, until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    threading.Thread(target=_die_with_parent, daemon=True).start()
    tokenizer = EncoderTokenizer.load(tokenizer_dir)
    encode = DocumentEncoder(tokenizer.tokenizer, store.token_dtype(tokenizer.num_tokens))
    while True:
        try:
            texts = _receive(sys.stdin.buffer)
        except EOFError:
            return
        _send(sys.stdout.buffer, _encode_all(encode, texts))


def _encode_all(encode: DocumentEncoder, texts: list[bytes]) -> tuple[np.ndarray, np.ndarray] | str:
    try:
        documents = [encode(text.decode()) for text in texts]
    except Exception as error:  # a bare Exception is what tokenizers raises; the parent reports it
        return f"{type(error).__name__}: {error}"
    lengths = np.array([len(ids) for ids in documents], dtype=np.int32)
    kept = lengths > 0  # control characters alone make no token
    return lengths[kept], np.concatenate(documents)


def _die_with_parent() -> None:
    """End this process when the parent's end of the pipe closes, even in the middle of a text."""
    poll = select.poll()
    poll.register(0, 0)  # no events asked: only a hang-up wakes it
    poll.poll()
    os._exit(1)
