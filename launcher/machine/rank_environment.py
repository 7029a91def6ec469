"""The place of a rank among the others, as the environment that its trainer reads."""

import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType

from enc.encoder.signals import STOP_SIGNALS

_OTHER_PLACE = "OMPI_COMM_WORLD_"  # where mpirun put the launching process, which DeepSpeed would take for the rank's


@dataclass(frozen=True)
class Place:
    """Where a rank stands, and where all ranks meet."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    address: str
    port: int
    node: str
    """Name of its machine."""


def rank_environment(place: Place, more: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """Return the environment of a rank's trainer; this process is its parent. `more` is what the config adds to it."""
    own = {
        "RANK": place.rank, "LOCAL_RANK": place.local_rank, "WORLD_SIZE": place.world_size,
        "LOCAL_WORLD_SIZE": place.local_world_size, "MASTER_ADDR": place.address, "MASTER_PORT": place.port,
        "ENC_LAUNCHER_PID": os.getpid(), "ENC_NODE_NAME": place.node,
    }  # fmt: skip
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(_OTHER_PLACE)}
    environment = {**inherited, **more, **{key: str(value) for key, value in own.items()}}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // place.local_world_size)))
    # By default a thread of libgomp spins for milliseconds while it waits for another. Beside one other busy process
    # that made a small model 50 times slower; with this it is a few times, and a quiet machine loses nothing.
    environment.setdefault("GOMP_SPINCOUNT", "10000")
    return environment


@contextmanager
def blocked_stop_signals() -> Iterator[None]:
    """Hold stop signals back while ranks are started: they inherit this and let signals in once they can save."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
