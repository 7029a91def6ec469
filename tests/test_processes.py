"""A forked program of the tests is the program that a new interpreter would be (see support/zygote.py)."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import processes
import pytest
from running import Enc, exact

pytestmark = pytest.mark.skipif(not processes.CAN_FORK, reason="programs are not forked where there is a GPU")

FACTS = """
import os, random, signal, sys, tempfile, threading
import numpy, torch
print(sys.argv, sys.path[0], os.getcwd(), __name__)
print(sorted(os.environ.items()))
print([(n, signal.getsignal(n)) for n in sorted(signal.valid_signals())], signal.pthread_sigmask(0, []))
print(threading.enumerate()[0].name, os.umask(0), sys.stdin.read(), sys.stdout.isatty(), sys.stdout.line_buffering)
print(sorted(map(int, os.listdir('/proc/self/fd')))[:3], os.getpgid(0) == os.getppid(), 'pytest' in sys.modules)
print(torch.get_num_threads(), torch.get_num_interop_threads())
print(torch.__config__.parallel_info())
print(random.random(), numpy.random.rand(), torch.rand(()).item(), file=sys.stderr)
"""


def both(folder: Path, environment: dict[str, str], *words: str) -> list[subprocess.CompletedProcess]:
    """Run `python *words` as a fork and as a new interpreter."""
    return [processes.run([sys.executable, *words], folder, environment, 60, real) for real in (False, True)]


@pytest.mark.parametrize("more", [{}, {"OMP_NUM_THREADS": "1", "ENC_X": "y", "RANK": "1"}], ids=["plain", "a rank"])
def test_a_fork_has_the_state_of_a_new_interpreter(tmp_path: Path, environment: dict[str, str], more: dict) -> None:
    """Arguments, folder, environment, signals, descriptors, threads, seeds."""
    (forked, real), (again, _) = (both(tmp_path, environment | more, "-c", FACTS, "a", "-b") for _ in range(2))
    drawn = [number for done in (forked, again, real) for number in done.stderr.split()]
    assert len(set(drawn)) == 9, "no two programs draw the same numbers unless they seed them"
    assert forked.stdout == real.stdout


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import sys; sys.exit()", 0),
        ("import sys; sys.exit(75)", 75),
        ("import sys; sys.exit('word')", 1),
        ("1 / 0", 1),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -9),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -15),
        ("raise KeyboardInterrupt", -2),
        ("import atexit; atexit.register(print, 'over')", 0),
        ("import threading, time; threading.Thread(target=lambda: (time.sleep(0.1), print('joined'))).start()", 0),
    ],
)
def test_a_fork_ends_as_a_new_interpreter_does(
    tmp_path: Path, environment: dict[str, str], code: str, expected: int
) -> None:
    """Exit codes, signals, output and the last words."""
    forked, real = both(tmp_path, environment, "-c", code)
    assert (forked.returncode, forked.stdout) == (expected, real.stdout)
    assert real.returncode == expected
    assert forked.stderr.splitlines()[-1:] == real.stderr.splitlines()[-1:]


def test_modules_and_files_run_as_main(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "here.py").write_text("import sys, os\nprint(__name__, sys.argv, sys.path[0] == os.getcwd())")
    for words in (
        ["-m", "here", "x"],
        [str(tmp_path / "here.py"), "x"],
        ["-P", "-c", "import sys; print(sys.argv)", "x"],
    ):
        forked, real = both(tmp_path, environment, *words)
        assert vars(forked) == vars(real)


def test_a_signal_reaches_a_fork_in_the_background(tmp_path: Path, environment: dict[str, str]) -> None:
    """`pid`, `poll`, `send_signal`, `wait` with a limit, `kill`."""
    code = "import signal, time; signal.signal(15, lambda *_: print('got', flush=True)); print('up', flush=True)\n" \
           "while True: time.sleep(1)"  # fmt: skip
    with (tmp_path / "log").open("w") as log:
        process = processes.start([sys.executable, "-c", code], tmp_path, environment, log, log)
    assert isinstance(process, processes.Forked)
    for number, said in ((None, "up\n"), (signal.SIGTERM, "up\ngot\n")):
        if number:
            process.send_signal(number)
        limit = time.monotonic() + 20
        while (tmp_path / "log").read_text() != said:
            assert time.monotonic() < limit
            time.sleep(0.01)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.01)
    assert process.poll() is None
    os.kill(process.pid, 0)
    process.kill()
    assert process.wait(timeout=20) == -9 == process.returncode


def test_another_environment_at_import_makes_a_real_process(tmp_path: Path, environment: dict[str, str]) -> None:
    """Libraries read some variables once: under another HF_HUB_OFFLINE the fork would be another program."""
    words = [sys.executable, "-c", "import os; print(os.environ['HF_HUB_OFFLINE'], os.getppid())"]
    done = processes.run(words, tmp_path, environment | {"HF_HUB_OFFLINE": "0"}, 60)
    assert done.stdout == f"0 {os.getpid()}\n"


@pytest.mark.parametrize(
    "options",
    [
        ["launch.nproc_per_node=2"],
        ["model.type=mpnet", "datacollator.whole_word=true"],
        ["launch.nproc_per_node=2", "parallel.engine=deepspeed", "parallel.zero_stage=2"],
        ["launch.nproc_per_node=2", "parallel.engine=fsdp", "dataset.num_workers=0"],
    ],
    ids=["ddp", "mpnet", "zero2", "fsdp"],
)
def test_forked_ranks_train_to_the_same_bits(
    enc: Enc, smoke: Callable[..., list[str]], environment: dict[str, str], options: list[str]
) -> None:
    """Weights and metrics of a run, forked or not; and what `enc` says, but for times and processes."""
    real = Enc(enc.folder, environment, real=True)
    weights = []
    for name, run in (("forked", enc), ("real", real)):
        run(*smoke(name, "trainer.max_steps=12", "model.dropout_prob=0.1", *options))
        weights.append((run.folder / name / "checkpoints" / "12" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert exact(enc.records("forked")) == exact(enc.records("real"))
    assert exact(enc.records("forked", "eval_loss")) == exact(enc.records("real", "eval_loss"))
