"""A copy of the code that a run goes on with."""

import shutil
from pathlib import Path

import enc


def snapshot_code(run_dir: Path) -> None:
    """Copy the package into `<run>/code/enc`, from which the job imports it."""
    source, target = Path(enc.__file__).parent, run_dir / "code" / "enc"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    shutil.copyfile(source / "__init__.py", target / "__init__.py")
    for room in enc.ROOMS:
        shutil.copytree(source / room, target / room, ignore=shutil.ignore_patterns("__pycache__"))
