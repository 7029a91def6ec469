"""Write a corpus to try things with: the docstrings of Python's own library, and which package each is from.

    python own_text.py [FOLDER]

FOLDER (by default corpus/) gets `docstrings.jsonl`, all texts, to pretrain on; beside it come `train.jsonl` and
`test.jsonl`, the texts of eight packages with their names, to fine-tune on. Replace it by whatever reads your own text.
"""

import ast
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("asyncio", "distutils", "email", "importlib", "logging", "tkinter", "unittest", "xml")
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests"}


def docstrings() -> Iterator[tuple[str, str]]:
    """Yield (package, text) of everything in Python's library that explains itself in a sentence or more."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root)
        if LEFT_OUT.isdisjoint(place.parts):
            for text in docstrings_of(path):
                yield place.parts[0].removesuffix(".py"), text


def docstrings_of(path: Path) -> Iterator[str]:
    """Yield the docstrings of a file, if it can be read."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, SyntaxError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= 60:
                yield text


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} texts")


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"text": text, "package": package} for package, text in docstrings()]
    write(folder / "docstrings.jsonl", [{"text": row["text"]} for row in rows])
    labelled = [row for row in rows if row["package"] in PACKAGES]
    write(folder.parent / "train.jsonl", [row for number, row in enumerate(labelled) if number % 4])
    write(folder.parent / "test.jsonl", labelled[::4])


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "corpus"))
