"""Shared runs on several ranks."""

from pathlib import Path

import pytest
from cluster import Cluster


@pytest.fixture(scope="package")
def cluster(tmp_path_factory: pytest.TempPathFactory, store: Path, environment: dict[str, str]) -> Cluster:
    """Runs that all tests of this folder share."""
    return Cluster(tmp_path_factory.mktemp("cluster"), store, {**environment, "DS_ACCELERATOR": "cpu"})
