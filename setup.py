"""The list of packages, which is made from the folders: an entry for each below a room that holds Python files."""

import ast
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def packages() -> list[str]:
    """Return `enc` and every folder with code below its rooms, dotted."""
    tree = ast.parse((ROOT / "__init__.py").read_text())
    rooms = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ROOMS"
    )
    folders = {path.parent.relative_to(ROOT) for room in rooms for path in (ROOT / room).rglob("*.py")}
    return ["enc", *(".".join(["enc", *folder.parts]) for folder in sorted(folders))]


setup(packages=packages(), script_name="setup.py")  # by its name it is kept out of the package that lies beside it
