"""Which tests of a session stay together on one worker, and which come first.

Tests that share a fixture of a module stay together, since each worker would make it again; every other test goes where
there is room. What takes longest comes first.
"""

import tomllib
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent
BUDGETS = tomllib.loads((TESTS / "budgets.toml").read_text())
# Made once for all workers, or in no time.
SHARED = {"environment", "store", "foreign", "finished_run", "small_stores", "cluster", "gpu", "tmp_path_factory"}


def file_of(item: pytest.Item) -> str:
    """Return the name of a test's file in the table of budgets."""
    return item.path.relative_to(TESTS).as_posix()


def own_fixtures(item: pytest.Item) -> list[str]:
    """Return the fixtures of a test that live longer than it and that only this suite's modules define."""
    fixtures = getattr(item, "_fixtureinfo").name2fixturedefs  # noqa: B009
    last = {name: found[-1] for name, found in fixtures.items() if name not in SHARED}
    return [f"{d.baseid}:{name}" for name, d in sorted(last.items()) if d.scope != "function" and d.baseid]


def groups(items: list[pytest.Item]) -> dict[pytest.Item, str]:
    """Name for each test that shares fixtures the first fixture of all that hang together."""
    parent: dict[str, str] = {}

    def first(name: str) -> str:
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    used = {item: own_fixtures(item) for item in items}
    for names in used.values():
        for name in names[1:]:
            one, other = sorted((first(names[0]), first(name)))
            parent[other] = one
    return {item: first(names[0]) for item, names in used.items() if names}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item, group in groups(items).items():
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: (not _waits(item), -BUDGETS.get(file_of(item), 0)))


def _waits(item: pytest.Item) -> bool:
    """Tell whether a test waits more than it computes: those of SLURM go on beside all others."""
    return "slurm" in getattr(item, "fixturenames", ())
