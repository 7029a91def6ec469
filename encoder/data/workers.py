"""Processes that tokenise."""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO, cast

import numpy as np

from enc.encoder.data import store
from enc.encoder.data.chunks import LENGTH
from enc.encoder.data.encoding import DocumentEncoder
from enc.encoder.data.tokenizer import EncoderTokenizer
from enc.encoder.errors import RunError
from enc.encoder.signals import end_with_pipe


class WorkerPool:
    """Worker processes that turn texts into ids, fed by one thread each. Leaving the block ends them."""

    def __init__(self, tokenizer_dir: Path, num_workers: int) -> None:
        self._tokenizer_dir = tokenizer_dir
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="tokenise")
        self._processes: list[subprocess.Popen[bytes]] = []
        self._idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        self._num_workers = num_workers

    def __enter__(self) -> "WorkerPool":
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
            answer: tuple[np.ndarray, np.ndarray] | str = _receive(cast(BinaryIO, process.stdout))
        except (OSError, EOFError) as error:
            code = process.wait()  # whoever takes this process next fails in the same way
            killed = f"was killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else None
            raise RunError(
                f"A tokenising process {killed or f'ended with code {code}'}; a kill usually means that memory ran "
                "out. Run the same command again to go on from here, with a smaller dataset.num_proc if it was memory."
            ) from error
        finally:
            self._idle.put(process)
        if isinstance(answer, str):
            raise RunError(f"The tokenizer failed on a text: {answer}.")
        return answer


def _start_worker(tokenizer_dir: Path) -> subprocess.Popen[bytes]:
    one_thread = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    # -P: nothing in the working directory may stand in for an installed package
    code = "import sys; from enc.encoder.data.workers import worker_main; worker_main(sys.argv[1])"
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
    end_with_pipe(sys.stdin.fileno())  # even in the middle of a text
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
