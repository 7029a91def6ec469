"""Kill a process that saves checkpoints, many times, at drawn file operations; print what was found after each kill.

Usage: kill_saves.py RUN KILLS. The weights of step s are all s, so that a mixture of two saves would show. Moments are
counted in operations on files, not in seconds, so that a busy machine kills where a quiet one does.
"""

import itertools
import json
import os
import random
import signal
import sys
from pathlib import Path

import torch

from enc.encoder.checkpoints.folder import list_checkpoints, newest_complete, verify
from enc.encoder.checkpoints.io import Saver, read_weights
from enc.encoder.optim.state_spec import ADAM_STATE
from enc.encoder.ranks import Ranks

FILE_OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}
SHAPES = {f"layer{n}.weight": (64, 257) for n in range(12)}


class Numbers:
    """The part of an engine that saving uses, with a number for its state."""

    shapes = SHAPES
    state_shapes = ADAM_STATE.tensors(SHAPES)

    def __init__(self, step: int) -> None:
        self.optimizer_steps = step

    def gather(self, keep):  # type: ignore[no-untyped-def]
        step = float(self.optimizer_steps)
        return {name: torch.full(shape, step) for name, shape in self.state_shapes.items() if keep(name)}


def die_at(operation: int) -> None:
    """Kill this process at its n-th operation on files, in whichever thread that is."""
    count = itertools.count(1)

    def hook(event: str, _: tuple[object, ...]) -> None:
        if event in FILE_OPERATIONS and next(count) == operation:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def save_for_ever(run: Path, first: int) -> None:
    saver = Saver(run, Ranks(0, 1, 0), [Path(__file__)], keep=2)
    step = first
    while True:
        saver.save(step, Numbers(step), {"step": step})  # type: ignore[arg-type]
        saver.wait()
        step += 1


def newest(run: Path) -> int:
    """Return the step of the newest checkpoint after checking every one; 0 when there is none."""
    steps = [0]
    for folder in list_checkpoints(run):
        status = verify(folder)
        assert status.state == "complete", status
        values = {tensor.unique().item() for tensor in read_weights(folder).values()}
        assert values == {float(folder.name)}, (folder, values)
        steps.append(int(folder.name))
    found, passed_over = newest_complete(run)
    assert passed_over == []
    assert steps[-1] == (int(found.name) if found else 0)
    return steps[-1]


def main(run: Path, kills: int) -> None:
    rng = random.Random(3)
    during_a_save = 0
    for operation in (rng.randint(1, 80) for _ in range(kills)):
        before = newest(run)
        child = os.fork()
        if child == 0:
            die_at(operation)
            save_for_ever(run, before + 1)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        during_a_save += any((run / "checkpoints").glob(".*"))
        assert newest(run) >= before
    last = newest(run) + 1
    saver = Saver(run, Ranks(0, 1, 0), [], keep=2)
    saver.save(last, Numbers(last), {"step": last})  # type: ignore[arg-type]
    saver.wait()
    left = [path.name for path in (run / "checkpoints").glob(".*")]
    print(json.dumps({"during_a_save": during_a_save, "newest": newest(run), "last": last, "left": left}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
