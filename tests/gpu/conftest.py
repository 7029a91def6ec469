"""Runs on one GPU; without one every test here is skipped."""

from pathlib import Path

import pytest
import torch
from cluster import Cluster


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="there is no CUDA GPU"))


@pytest.fixture(scope="package")
def gpu(tmp_path_factory: pytest.TempPathFactory, store: Path, environment: dict[str, str]) -> Cluster:
    """Runs that all tests of this folder share."""
    return Cluster(tmp_path_factory.mktemp("gpu"), store, {**environment, "DS_ACCELERATOR": "cuda"})
