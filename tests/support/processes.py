"""Starting Python programs from tests: forked from a process that has done the slow imports, or real ones."""

import atexit
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from zygote import LENGTH, can_follow

SERVER = Path(__file__).with_name("zygote.py")
QUIET = {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
# Forks of a process that uses a GPU do not work; and all tests can be run with nothing but real processes.
CAN_FORK = hasattr(os, "pidfd_open") and not Path("/dev/nvidiactl").exists() and "ENC_TESTS_REAL" not in os.environ


def quiet_environment() -> dict[str, str]:
    """Return the environment of programs: plain width, no colours, offline."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | QUIET


class Forked:
    """A forked program, with what tests use of `subprocess.Popen`."""

    def __init__(self, args: list[str], channel: socket.socket) -> None:
        self.args, self.channel, self.returncode, self.cpu_s = args, channel, None, 0.0
        self.lines = channel.makefile("r")
        self.pid = int(self.lines.readline())

    def poll(self) -> int | None:
        return self._look(0)

    def wait(self, timeout: float | None = None) -> int:
        if self._look(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode

    def _look(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            self.channel.settimeout(timeout)
            try:
                self.channel.recv(1, socket.MSG_PEEK)
            except (TimeoutError, BlockingIOError):
                return None
            self.channel.settimeout(None)
            with self.channel, self.lines:
                end = json.loads(self.lines.readline())
            self.returncode, self.cpu_s = end["code"], end["cpu_s"]
            Zygote.cpu_s += self.cpu_s
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> "Forked":
        return self

    def __exit__(self, *_error: object) -> None:
        self.wait()


class Zygote:
    """The process that forks; one for each worker of pytest, started by the first program."""

    current: "Zygote | None" = None
    cpu_s = 0.0  # of all forked programs that have ended, with what they started

    def __init__(self) -> None:
        self.environment = quiet_environment() | {"GOMP_SPINCOUNT": "10000"}  # read when libgomp is loaded
        self.requests, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, str(SERVER), str(theirs.fileno())], env=self.environment, pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            )  # fmt: skip
        atexit.register(self.end)

    @classmethod
    def get(cls) -> "Zygote":
        if cls.current is None:
            cls.current = cls()
        return cls.current

    def end(self) -> None:
        self.requests.close()
        self.process.wait(timeout=20)

    def start(self, words: list[str], folder: Path, environment: Mapping[str, str], files: list[int]) -> Forked:
        ours, theirs = socket.socketpair()
        request = pickle.dumps((words[1:], str(folder), dict(environment)))
        with theirs:
            socket.send_fds(self.requests, [LENGTH.pack(len(request))], [*files, theirs.fileno()])
            self.requests.sendall(request)
        return Forked(words, ours)


def start(words: list[str], folder: Path, environment: Mapping[str, str], output: IO, errors: IO,
          real: bool = False) -> subprocess.Popen | Forked:  # fmt: skip
    """Start `[sys.executable, ...]` in the background; stdin is empty."""
    assert words[0] == sys.executable
    if real or not CAN_FORK or not can_follow(environment, quiet_environment()):
        return subprocess.Popen(
            words, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=errors
        )
    with Path(os.devnull).open() as empty:
        files = [empty.fileno(), output.fileno(), errors.fileno()]
        return Zygote.get().start(words, folder, environment, files)


def run(words: list[str], folder: Path, environment: Mapping[str, str], timeout: float,
        real: bool = False) -> subprocess.CompletedProcess:  # fmt: skip
    """Run a program to its end and return its exit code and what it printed."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = start(words, folder, environment, output, errors, real)
        try:
            code = process.wait(timeout=timeout)
        except BaseException:
            process.kill()
            process.wait()
            raise
        return subprocess.CompletedProcess(words, code, _text(output), _text(errors))


def _text(file: IO) -> str:
    file.seek(0)
    return file.read()


def cpu_s() -> float:
    """Return the processor seconds of this process and of every program that it started and that has ended."""
    own = os.times()
    return own.user + own.system + own.children_user + own.children_system + Zygote.cpu_s
