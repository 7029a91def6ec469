"""Loading exported folders: offline, with the code that transformers copies in a folder of the test's own."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def modules_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep code of exports out of the user's cache, and that of other tests out of this one, whoever comes first."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "__init__.py").touch()
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])  # before that of the user, which another test may need
    _forget()
    yield
    _forget()


def _forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        del sys.modules[name]
