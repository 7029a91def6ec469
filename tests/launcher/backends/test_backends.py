"""The backends that there are, and what all of them keep to."""

from typing import get_args

import pytest

from enc.encoder.config.launch import LaunchConfig
from enc.launcher.backends.registry import BACKENDS, owner_of


def test_every_value_of_the_scheduler_is_a_backend() -> None:
    """What the config allows can be launched, and nothing else is there."""
    names = get_args(LaunchConfig.model_fields["scheduler"].annotation)
    assert [name for name in names if name != "auto"] == list(BACKENDS)


@pytest.mark.parametrize(("job", "name"), [("12", "slurm"), ("12_3", "slurm"), ("12_", None), ("x", None), ("", None)])
def test_an_id_has_one_owner_at_most(job: str, name: str | None) -> None:
    """Jobs of several schedulers in one run folder are told apart by their ids alone."""
    owner = owner_of(job)
    assert (owner.name if owner else None) == name
    assert sum(backend.owns(job) for backend in BACKENDS.values()) <= 1
