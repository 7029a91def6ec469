"""A rank's environment says one place."""

import pytest

from enc.launcher.machine.rank_environment import Place, rank_environment

PLACE = Place(rank=1, local_rank=1, world_size=2, local_world_size=2, address="127.0.0.1", port=5, node="here")


def test_the_place_that_mpirun_gave_to_the_launch_is_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed takes it for the rank's own, and stops where the two differ."""
    for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"):
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", "0")
    monkeypatch.setenv("OMPI_MCA_btl", "tcp")
    environment = rank_environment(PLACE)
    assert not [key for key in environment if key.startswith("OMPI_COMM_WORLD_")]
    assert environment["OMPI_MCA_btl"] == "tcp"
    assert environment["LOCAL_RANK"] == "1"
