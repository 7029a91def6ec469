"""Which tests of a session stay together on one worker, and which come first.

Tests that share a fixture of a module stay together, since each worker would make it again; every other test goes where
there is room. What takes longest comes first.
"""

import tomllib
from collections.abc import Callable
from types import FunctionType

import pytest
from places import TESTS

BUDGETS = tomllib.loads((TESTS / "budgets.toml").read_text())
# Made once for all workers, or in no time; `slurm` in seconds, and its tests wait too long to stay on one worker.
SHARED = {
    "environment",
    "store",
    "foreign",
    "finished_run",
    "small_stores",
    "cluster",
    "gpu",
    "slurm",
    "tmp_path_factory",
}


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
    for item in filter(starts_processes, items):
        item.add_marker(pytest.mark.processes)
    items.sort(key=lambda item: (not _waits(item), -BUDGETS.get(file_of(item), 0)))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuse to go on when xdist does not keep groups together: their fixtures would be made by every worker."""
    if getattr(session.config.option, "loadgroup", False):
        apart = [item for item in session.items if item.get_closest_marker("xdist_group") and "@" not in item.nodeid]
        assert not apart, "pytest-xdist does not see the groups of tests under this version of pytest"


def _waits(item: pytest.Item) -> bool:
    """Tell whether a test waits more than it computes: those of SLURM go on beside all others."""
    return "slurm" in getattr(item, "fixturenames", ())


# --- tests that start programs ---------------------------------------------------------------------------------------

STARTING = {"enc", "smoke", "store", "foreign", "finished_run", "cluster", "slurm", "gpu"}


def starts_processes(item: pytest.Item) -> bool:
    """Tell whether a test starts programs: by its fixtures, or by what it and the functions that it calls name."""
    if STARTING & set(getattr(item, "fixturenames", ())):
        return True
    found = {d[-1].func for d in getattr(item, "_fixtureinfo").name2fixturedefs.values() if d[-1].baseid}  # noqa: B009
    return any(_names_processes(function, set()) for function in {item.function, *found})  # type: ignore[attr-defined]


def _names_processes(function: Callable[..., object], seen: set[str]) -> bool:
    code, names = getattr(function, "__code__", None), getattr(function, "__globals__", {})
    if code is None or function.__qualname__ in seen:
        return False
    seen.add(function.__qualname__)
    if {"subprocess", "processes", "fork", "Enc", "run_writer"} & {*code.co_names}:
        return True
    called = [names.get(name) for name in code.co_names]
    return any(isinstance(f, FunctionType) and not f.__module__.startswith("enc.") and _names_processes(f, seen)
               for f in called)  # fmt: skip
