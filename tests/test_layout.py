"""The package's shape: what is installed, who imports whom, what a command costs at start."""

import ast
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from places import ROOT

import enc

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text()) if (ROOT / "pyproject.toml").exists() else None
needs_checkout = pytest.mark.skipif(PROJECT is None, reason="enc is not installed from a checkout")
# Who may import whom: a room, and the rooms below it. `encoder`, `launcher` and `tools` alone stand for the files that
# lie flat in them; programs that join rooms (`__main__.py`) count as such. A section of the config (`config.py` in a
# room of encoder/) counts as ground: any room may read it.
ALLOWED = {
    "kernels": "",
    "ds_configs": "",
    "slurm": "",
    "slurm.sites": "",
    "encoder.recipes": "",
    "encoder": "",
    "encoder.models": "kernels encoder",
    "encoder.config": "encoder encoder.models",
    "encoder.sizing": "encoder encoder.config encoder.models encoder.optim",
    "encoder.data": "kernels encoder encoder.config encoder.models encoder.sizing",
    "encoder.objectives": "kernels encoder encoder.data encoder.models",
    "encoder.optim": "encoder encoder.models",
    "encoder.engine": "encoder encoder.config encoder.models encoder.optim encoder.sizing",
    "encoder.checkpoints": "encoder encoder.engine encoder.optim",
    "encoder.evaluate": "encoder encoder.data",
    "encoder.run": "encoder encoder.*",
    "tools.readers": "encoder encoder.checkpoints encoder.optim",
    "tools.annotated_mpnet": "encoder encoder.config",
    "tools.models": "encoder encoder.* tools.readers",
    "tools": "encoder encoder.* tools.models tools.readers",
    "tools.bench": "kernels encoder encoder.* tools tools.readers",
    "launcher.machine": "encoder",
    "launcher.run_folder": "encoder encoder.checkpoints encoder.engine",
    "launcher.planning": "encoder encoder.checkpoints encoder.config encoder.data encoder.engine encoder.models "
                         "encoder.optim encoder.sizing launcher.machine launcher.run_folder",
    "launcher.checks": "encoder encoder.checkpoints encoder.config encoder.data encoder.sizing launcher.machine "
                       "launcher.planning",
    "launcher.supervise": "encoder encoder.checkpoints encoder.config encoder.sizing launcher.machine "
                          "launcher.planning launcher.run_folder",
    "launcher.backends": "encoder encoder.checkpoints encoder.config encoder.data encoder.sizing launcher.machine "
                         "launcher.run_folder launcher.planning launcher.checks launcher.supervise",
    "launcher.watch": "encoder encoder.checkpoints encoder.config launcher.run_folder launcher.backends",
    "launcher.api": "encoder encoder.* tools launcher.machine launcher.planning launcher.backends",
    "launcher.cli": "encoder encoder.* tools tools.* launcher.machine launcher.run_folder launcher.planning "
                    "launcher.checks launcher.backends launcher.watch launcher.api",
    "launcher": "encoder launcher.supervise launcher.backends",
}  # fmt: skip


def code_files() -> list[Path]:
    return [path for room in enc.ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def dotted(path: Path) -> str:
    """Return the name of a file's module below enc."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def module_of(target: str) -> str:
    """Return the module below enc that an import names, without the name that it takes from it."""
    parts = target.split(".")
    while len(parts) > 1 and not (
        (ROOT / "/".join(parts)).is_dir() or (ROOT / "/".join(parts)).with_suffix(".py").exists()
    ):
        parts.pop()
    return ".".join(parts)


def is_section(module: str) -> bool:
    """Tell whether a module holds sections of the run config, which are composed in encoder.config."""
    return module.startswith("encoder.") and module.endswith(".config") and module.count(".") > 1


def room_of(module: str) -> str:
    """Return the room of a dotted module below enc, e.g. encoder.data for encoder.data.sources.find."""
    if is_section(module):
        return "encoder"
    parts = [*module.split("."), ""]
    if module.endswith(".__main__"):
        return parts[0]
    return ".".join(parts[:2]) if (ROOT / parts[0] / parts[1]).is_dir() else parts[0]


def may_import(room: str, target: str) -> bool:
    """Tell whether a room may import from another; `encoder.*` stands for all rooms of encoder/."""
    return not {target, f"{target.partition('.')[0]}.*"}.isdisjoint({room, *ALLOWED[room].split()})


@needs_checkout
def test_every_folder_of_the_checkout_is_a_room_or_known_to_be_none() -> None:
    """A folder with code that is missing from ROOMS would be missing from the wheel."""
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    folders = {line.partition("/")[0] for line in tracked.stdout.splitlines() if "/" in line}
    assert folders in (set(), {*enc.ROOMS, "tests", "examples"})
    assert all((ROOT / room).is_dir() for room in enc.ROOMS)


@needs_checkout
def test_every_data_file_is_in_package_data() -> None:
    """Recipes and templates reach the wheel."""
    patterns = PROJECT["tool"]["setuptools"]["package-data"]
    files = [
        p for room in enc.ROOMS for p in (ROOT / room).rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")
    ]
    for path in files:
        assert any(path.match(pattern) for pattern in patterns["*"]), f"{path} is not installed"
        assert list(path.parent.glob("*.py")), f"{path.parent} is no package: give it an empty __init__.py"
    assert files


def test_kernels_is_not_a_regular_package() -> None:
    """A `kernels` folder with __init__.py on sys.path would shadow Hugging Face's and break transformers."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_transformers_imports_with_the_checkout_on_the_path() -> None:
    """Tools that put the working directory on the path do not break each other."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from transformers import PreTrainedModel"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@needs_checkout
def test_every_interpreter_that_is_started_gets_p() -> None:
    """Without -P, a `token.py` of the working folder would run in the place of the module of that name."""
    files = [path for room in ("encoder", "launcher", "tools") for path in (ROOT / room).rglob("*.py")]
    started = [line for path in files if path.parts[-2] != "bench" for line in path.read_text().splitlines()]
    started = [line.strip() for line in started if 'python, "-' in line or 'sys.executable, "-' in line]
    assert len(started) >= 6
    assert [line for line in started if '"-P"' not in line] == []


def test_no_conftest_in_the_root_and_no_tests_package() -> None:
    assert not (ROOT / "conftest.py").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["launch", "pretrain", "smoke", "--dry-run"],
        ["config", "check", "smoke"],
        ["render", "deepspeed", "smoke"],
        ["render", "fsdp", "smoke"],
        ["render", "slurm", "smoke", "--site", "plain", "--to", "job"],
        ["config", "sites"],
        ["config", "from-mpnet", "--", "-wd", "0.1"],
        ["plan", "smoke"],
        ["status"],
        ["ls"],
        ["logs"],
        ["status", "--json"],
        ["bench", "kernels", "--help"],
        ["bench", "step", "--help"],
        ["fill-mask", "--help"],
        ["encode", "--help"],
    ],
)
def test_light_commands_import_no_torch(words: list[str], tmp_path: Path) -> None:
    """Help, checks, plans and looks at a run answer at once."""
    (tmp_path / "run" / "logs" / "1").mkdir(parents=True)
    (tmp_path / "run" / "launches" / "1").mkdir(parents=True)
    for name in ("config.yaml", "events.jsonl", "logs/1/console.log"):
        (tmp_path / "run" / name).touch()
    code = (
        "import sys\nfrom enc.launcher.cli.app import app\n"
        f"sys.argv = ['enc', *{words!r}]\n"
        "try: app()\nexcept SystemExit as e: assert not e.code, e.code\n"
        "heavy = {'torch', 'deepspeed', 'transformers', 'datasets', 'pyarrow.parquet'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, timeout=60, stdout=subprocess.DEVNULL)


def wrong_imports(room: str, source: str) -> list[str]:
    """Return what a module of a room must not import, with every relative import."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            wrong += ["a relative import"] * bool(node.level)
            from_enc = node.module and node.module.startswith("enc")
            targets = [f"{node.module}.{alias.name}" for alias in node.names] if from_enc else []
        else:
            targets = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        below = [target.removeprefix("enc.") for target in targets if target.startswith("enc.")]
        # Without a dot it is enc itself, or its version.
        wrong += [name for name in below if "." in name and not may_import(room, room_of(module_of(name)))]
    return wrong


@pytest.mark.parametrize("path", code_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_are_absolute_and_point_one_way(path: Path) -> None:
    """A room imports only from the rooms below it."""
    assert wrong_imports(room_of(dotted(path)), path.read_text()) == []


@pytest.mark.parametrize("room", ALLOWED)
def test_each_rule_can_fail(room: str) -> None:
    """An import from any room that a rule does not name is found, however it is written."""
    modules = {room_of(module): module for module in map(dotted, code_files()) if not is_section(module)}
    for other, module in modules.items():
        expected = [] if may_import(room, other) else [module]
        assert wrong_imports(room, f"import enc.{module}") == expected
        if "." in module:
            package, _, name = module.rpartition(".")
            assert wrong_imports(room, f"def f():\n    from enc.{package} import {name}") == expected
    assert wrong_imports(room, "from . import x") == ["a relative import"]


def test_the_rules_make_no_circle() -> None:
    """Rooms can be put into an order in which each imports only from those before it."""
    below = {room: {other for other in ALLOWED if other != room and may_import(room, other)} for room in ALLOWED}
    order = list(TopologicalSorter(below).static_order())
    assert len(order) == len(ALLOWED)


def test_every_room_has_a_rule() -> None:
    """A new room says what it may import, and no rule is left of one that is gone."""
    folders = {room_of(dotted(path)) for path in code_files()}
    assert folders == ALLOWED.keys()
