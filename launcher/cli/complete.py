"""What a shell offers where a word is wanted: recipes, runs, checkpoints, keys of the config."""

from pathlib import Path


def configs(incomplete: str) -> list[str]:
    """Return recipes, and YAML files of the folder that is being typed."""
    folder = Path(incomplete) if incomplete.endswith("/") else Path(incomplete).parent
    files = [str(path) + ("/" if path.is_dir() else "") for path in _entries(folder) if path.is_dir() or _is_yaml(path)]
    return _that_begin(incomplete, [*recipes(""), *files])


def recipes(incomplete: str) -> list[str]:
    """Return the built-in configs."""
    import enc.encoder.recipes as folder  # alone: what reads configs takes longer than a person waits

    found = [path.stem for place in folder.__path__ for path in Path(place).glob("*.yaml")]
    return _that_begin(incomplete, sorted(found))


def runs(incomplete: str) -> list[str]:
    """Return the runs here, the newest first."""
    from enc.launcher.run_folder.find import find_runs

    return _that_begin(incomplete, [str(run.relative_to(Path.cwd())) for run in find_runs(Path.cwd())])


def checkpoints(incomplete: str) -> list[str]:
    """Return the runs here, the best checkpoint of each, and each checkpoint."""
    found = []
    for run in runs(""):
        steps = [str(path) for path in _entries(Path(run) / "checkpoints") if path.name.isdecimal()]
        found += [run, f"{run}/best", *steps]
    return _that_begin(incomplete, found)


def resumable(incomplete: str) -> list[str]:
    """Return the words for a checkpoint, and the checkpoints here."""
    return _that_begin(incomplete, ["latest", "best", *(name for name in checkpoints("") if "/checkpoints/" in name)])


def keys(incomplete: str) -> list[str]:
    """Return the keys of a config as overrides, spelt as they were begun: with or without dashes."""
    from enc.encoder.config.schema import RunConfig

    dashes = "--" if incomplete.startswith("-") else ""
    section, dot, _ = incomplete.removeprefix("--").partition(".")
    fields = RunConfig.model_fields
    inner = getattr(fields[section].annotation, "model_fields", {}) if dot and section in fields else {}
    own = [name + ("." if hasattr(field.annotation, "model_fields") else "=") for name, field in fields.items()]
    found = [f"{section}.{name}=" for name in inner] if dot else own
    return _that_begin(incomplete, [dashes + name for name in found])


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError:
        return []


def _is_yaml(path: Path) -> bool:
    return path.suffix in (".yaml", ".yml")


def _that_begin(incomplete: str, names: list[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
