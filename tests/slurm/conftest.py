"""One SLURM for all tests of this folder."""

from collections.abc import Iterator

import pytest
from slurm.cluster import Slurm, missing


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Four idle nodes."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.stop()
    for daemon in cluster.daemons.values():
        daemon.wait(20)
