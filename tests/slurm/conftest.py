"""One real SLURM for all tests of this folder."""

from collections.abc import Iterator

import pytest
from cluster_slurm import Slurm, missing


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Four virtual nodes n1 to n4."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.stop()
