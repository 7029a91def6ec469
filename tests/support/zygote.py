"""A process that has imported everything slow and forks Python programs on request: `python zygote.py FD`.

Tests start some 500 programs, and two seconds of each go into `import torch`. A fork of a process that has done it
is the same program otherwise: a process of its own with its arguments, environment, folder, signals and exit code.
What a forked program starts in turn, ranks and tokenising workers, is forked from it, so that parents and groups
are what they are without this. Workers of pytest connect to the listening Unix socket FD (see `processes.py`).
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import pickle
import re
import runpy
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

LENGTH = struct.Struct("<I")
# Programs that forked ones start, as patterns of their arguments: commands, ranks, tokenising workers.
FORKED = re.compile(
    r"(-P )?(-c from enc\.launcher\.cli(\.app)? import main|-m enc\.encoder\.([a-z_]+\.)*start )|-P -c .* worker_main\("
)
# Variables that are read when they are needed; any other one may have been read by an import.
LATE = re.compile(
    r"ENC_.*|SLURM.*|PYTEST.*|MASTER_.*|(LOCAL_)?(RANK|WORLD_SIZE)|OMP_NUM_THREADS|GOMP_SPINCOUNT|DS_ACCELERATOR"
    r"|TOKENIZERS_PARALLELISM|RAYON_NUM_THREADS|XDG_CONFIG_HOME|XDG_CACHE_HOME|HOME|PATH|USER|PWD|OLDPWD|SHLVL|_"
)
LIBRARIES = (
    "deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer", "transformers", "datasets", "tensorboard",
    "torch.utils.tensorboard", "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch._inductor.compile_fx",
    "torch.profiler._memory_profiler", "functorch.compile", "setuptools", "setuptools.dist", "deepspeed.comm.torch",
    "deepspeed.module_inject.auto_tp", "deepspeed.moe.layer", "deepspeed.ops.op_builder.all_ops",
)  # fmt: skip
ROOMS = ("encoder", "kernels", "tools", "launcher")


def can_follow(wanted: Mapping[str, str], here: Mapping[str, str]) -> bool:
    """Tell whether a process that did its imports under `here` may go on under the environment `wanted`."""
    differing = {name for name, value in {*wanted.items()} ^ {*here.items()}}
    return all(LATE.fullmatch(name) for name in differing)


def modules() -> Iterator[str]:
    """Every module of the package that a program of the tests may import."""
    root = Path(importlib.import_module("enc").__file__).parent
    for room in ROOMS:
        for path in sorted((root / room).rglob("*.py")):
            yield ".".join(["enc", *path.relative_to(root).with_suffix("").parts]).removesuffix(".__init__")


def preload() -> None:
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):  # a module that another version lacks only costs time
            importlib.import_module(name)
    for name in modules():
        importlib.import_module(name)
    assert threading.active_count() == 1, "a fork has one thread: imports must start none"
    gc.collect()
    gc.freeze()  # a collection in a child leaves the pages of what is imported alone


# --- in the child ----------------------------------------------------------------------------------------------------


def become(words: list[str], folder: str | None, environment: Mapping[str, str], files: Mapping[int, int],
           keep: tuple[int, ...]) -> NoReturn:  # fmt: skip
    """Turn this forked process into `python *words`; `files` says which descriptor is which of 0, 1 and 2."""
    code = 1
    try:
        _fresh_signals()
        for target, descriptor in files.items():
            os.dup2(descriptor, target)
        _close_all_but({0, 1, 2, *keep})
        os.environ.clear()
        os.environ.update(environment)
        if folder is not None:
            os.chdir(folder)
        _fresh_state()
        code = _outcome(lambda: _run(words))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _fresh_signals() -> None:
    """Handlers as in a new interpreter; what was ignored stays ignored, as exec leaves it."""
    signal.set_wakeup_fd(-1)  # its descriptor will be another file's
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _close_all_but(kept: set[int]) -> None:
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor not in kept:
            with contextlib.suppress(OSError):
                os.close(descriptor)


def _fresh_state() -> None:
    sys.stdin, sys.stdout, sys.stderr = sys.__stdin__, sys.__stdout__, sys.__stderr__
    sys.modules["numpy"].random.seed()
    sys.modules["torch"].default_generator.seed()
    threads = os.environ.get("OMP_NUM_THREADS")
    with Path("/proc/self/maps").open() as maps:
        libraries = {line.split()[-1] for line in maps if "libgomp" in line}
    for library in libraries if threads else ():  # libgomp read its variables when it was loaded
        ctypes.CDLL(library).omp_set_num_threads(int(threads))


def _run(words: list[str]) -> None:
    match words:
        case ["-P", "-c", code, *rest]:
            _run_code(code, rest)
        case ["-c", code, *rest]:
            sys.path[0:0] = [""]
            _run_code(code, rest)
        case ["-m", module, *rest]:
            sys.path[0:0] = [os.getcwd()]
            _run_module(module, rest)
        case ["-P", "-m", module, *rest]:
            _run_module(module, rest)
        case [script, *rest]:
            sys.path[0:0] = [str(Path(script).parent)]
            sys.argv = [script, *rest]
            runpy.run_path(script, run_name="__main__")


def _run_module(module: str, rest: list[str]) -> None:
    sys.argv = [module, *rest]
    sys.modules.pop(module, None)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _run_code(code: str, rest: list[str]) -> None:
    sys.argv = ["-c", *rest]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(code, "<string>", "exec"), main.__dict__)


def _outcome(program: Callable[[], None]) -> int:
    """Run a program and end it as the interpreter does; return its exit code."""
    code, interrupted = 0, False
    try:
        program()
    except SystemExit as error:
        code = _exit_code(error.code)
    except BaseException as error:
        sys.excepthook(*sys.exc_info())
        code, interrupted = 1, isinstance(error, KeyboardInterrupt)
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        code = 120
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    return code & 0xFF


def _exit_code(code: object) -> int:
    if code is None or isinstance(code, int):
        return int(code or 0)
    print(code, file=sys.stderr)
    return 1


# --- what forked programs start --------------------------------------------------------------------------------------

_execute = subprocess.Popen._execute_child


def _fork_or_execute(
    self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell, p2cread,
    p2cwrite, c2pread, c2pwrite, errread, errwrite, restore_signals, gid, gids, uid, umask, start_new_session,
    process_group,
):  # fmt: skip
    """Start a program as Popen does, by a fork where that is enough."""
    wanted = dict(os.environ if env is None else env)
    words = [] if isinstance(args, (str, bytes)) else [str(word) for word in args]
    if not _may_fork(words, wanted):
        _execute(
            self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
            p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, restore_signals, gid, gids, uid, umask,
            start_new_session, process_group,
        )  # fmt: skip
        return
    given = {0: p2cread, 1: c2pwrite, 2: errwrite}
    gc.collect()
    sys.stdout.flush()
    sys.stderr.flush()
    self.pid = os.fork()
    if self.pid == 0:
        if process_group == 0:
            os.setpgid(0, 0)
        become(words[1:], cwd, wanted, {k: v for k, v in given.items() if v != -1}, tuple(pass_fds))
    if process_group == 0:
        with contextlib.suppress(OSError):
            os.setpgid(self.pid, self.pid)  # here too, for whoever asks first
    self._child_created = True
    self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)


def _may_fork(words: list[str], environment: Mapping[str, str]) -> bool:
    known = words[:1] == [sys.executable] and FORKED.match(" ".join(words[1:]))
    return bool(known) and threading.active_count() == 1 and can_follow(environment, _at_import)


# --- the server ------------------------------------------------------------------------------------------------------


def serve(listener: socket.socket) -> None:
    """Fork what is asked for and tell on each program's own socket its pid and how it ended.

    It ends when nobody is connected any more.
    """
    wait = selectors.DefaultSelector()
    wait.register(listener, selectors.EVENT_READ)
    askers = 0
    while True:
        for key, _ in wait.select():
            if key.fileobj is listener:
                wait.register(listener.accept()[0], selectors.EVENT_READ)
                askers += 1
            elif key.data:
                wait.unregister(key.fileobj)
                _report(key.fd, *key.data)
            elif not _answer(key.fileobj, wait):
                wait.unregister(key.fileobj)
                key.fileobj.close()
                askers -= 1
        if not askers:
            return


def _answer(requests: socket.socket, wait: selectors.BaseSelector) -> bool:
    header, descriptors, _, _ = socket.recv_fds(requests, LENGTH.size, 4)
    if len(header) < LENGTH.size:
        return False
    data = b""
    while len(data) < LENGTH.unpack(header)[0]:
        data += requests.recv(LENGTH.unpack(header)[0] - len(data))
    words, folder, environment = pickle.loads(data)
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        become(words, folder, environment, dict(enumerate(descriptors[:3])), ())
    for descriptor in descriptors[:3]:
        os.close(descriptor)
    channel = socket.socket(fileno=descriptors[3])
    channel.sendall(f"{pid}\n".encode())
    wait.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, channel))
    return True


def _report(pidfd: int, pid: int, channel: socket.socket) -> None:
    _, status, usage = os.wait4(pid, 0)
    os.close(pidfd)
    end: dict[str, Any] = {"code": os.waitstatus_to_exitcode(status), "cpu_s": usage.ru_utime + usage.ru_stime}
    with channel, contextlib.suppress(OSError):  # nobody has to wait for it
        channel.sendall(json.dumps(end).encode() + b"\n")


if __name__ == "__main__":
    _at_import = dict(os.environ)
    subprocess.Popen._execute_child = _fork_or_execute
    preload()
    sys.path.pop(0)  # this file's folder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the programs
    serve(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)
