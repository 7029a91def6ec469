"""The built-in source: docstrings of the Python that runs."""

import ast
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path


def python_docs() -> Iterator[str]:
    """Yield the help topics and every distinct docstring of the running Python's standard library, in a fixed order.

    The library's files are parsed, never imported: importing some of them opens browsers, prints or needs a display.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    for text in (*(topics[name] for name in sorted(topics)), *_docstrings()):
        if text not in seen:
            seen.add(text)
            yield text


def _docstrings() -> Iterator[str]:
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload"}
    for root, folders, files in os.walk(sysconfig.get_paths()["stdlib"]):
        folders[:] = sorted(set(folders) - skipped)
        for name in sorted(files):
            if name.endswith(".py"):
                yield from _file_docstrings(Path(root, name))


def _file_docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():  # old escapes in library code are not the user's business
            warnings.simplefilter("ignore")
            module = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):  # templates and deliberately broken samples
        return
    for node in ast.walk(module):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and text == text.encode(errors="ignore").decode():  # half surrogates are no text
                yield text
