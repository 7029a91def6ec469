"""Recipes and site profiles: configs that are found by name."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from enc.encoder.config.yaml_source import A_SITE, COMMAND_LINE, Problem, Source, get_key, read_config_text, read_yaml
from enc.encoder.errors import UsageError
from enc.encoder.spelling import did_you_mean

RECIPES = Path(__file__).parents[1] / "recipes"
SITES = Path(__file__).parents[2] / "slurm" / "sites"


def find_config(name: str) -> Path:
    """Return the path of a config file, or of the recipe of that name. Raises UsageError when there is neither."""
    path, recipe = Path(name), RECIPES / f"{name}.yaml"
    if path.is_file():
        return path
    if recipe.is_file():
        return recipe
    if path.is_dir():
        inside = path / "config.yaml"
        hint = f"; did you mean {inside}?" if inside.is_file() else ". Name a YAML file or a recipe."
        raise UsageError(f"{path} is a folder, not a config file{hint}")
    recipes = sorted(p.stem for p in RECIPES.glob("*.yaml"))
    raise UsageError(
        f"There is no config file {name!r} and no recipe of that name{did_you_mean(name, recipes) or '.'} "
        f"Recipes are: {', '.join(recipes)}."
    )


def site_files() -> dict[str, Path]:
    """Return the site profiles by name: those of the user, which come first, and the built-in ones."""
    own = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "enc" / "sites"
    return {path.stem: path for folder in (SITES, own) for path in sorted(folder.glob("*.yaml"))}


def find_site(name: str) -> Path:
    """Return the path of a site profile: a file, or one by its name. Raises UsageError when there is neither."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    sites = site_files()
    if name not in sites:
        raise UsageError(
            f"There is no site profile {name!r} and no file of that name{did_you_mean(name, list(sites)) or '.'} "
            f"Sites are: {', '.join(sites)}. Own ones go into ~/.config/enc/sites."
        )
    return sites[name]


def lay_site_under(source: Source) -> None:
    """Fill the section `launch` of a config with the values of its site profile.

    The config's own values win, unless the site was named on the command line: then only other values given there do.
    """
    given, name = get_key(source.tree, "launch.site")
    if not given or not isinstance(name, str) or not name:
        return
    path = find_site(name)
    site = read_yaml(read_config_text(path), str(path), A_SITE)
    source.problems += [replace(problem, key=f"launch.{problem.key}") for problem in site.problems]
    wrong = {
        "site": "cannot be set by a site profile; take the line out",
        "launch": "is no key of a site profile, which is the section launch itself; write its keys without it",
    }
    for key in wrong.keys() & site.tree.keys():
        source.problems.append(Problem(key, wrong[key], site.place(key)))
        del site.tree[key]
    _lay_under(source, "launch", source.tree["launch"], site, site.tree, source.place("launch.site") == COMMAND_LINE)


def _lay_under(
    source: Source, prefix: str, upper: dict[str, Any], site: Source, lower: dict[str, Any], wins: bool
) -> None:
    for name, value in lower.items():
        key = f"{prefix}.{name}"
        if isinstance(value, dict) and isinstance(upper.get(name), dict):
            _lay_under(source, key, upper[name], site, value, wins)
        elif name not in upper or (wins and source.place(key) != COMMAND_LINE):
            upper[name] = value
            places = {f"launch.{below}": place for below, place in site.places.items()}
            source.places |= {below: place for below, place in places.items() if f"{below}.".startswith(f"{key}.")}
