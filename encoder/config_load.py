"""From YAML and command-line words to a `RunConfig`, with every problem of the input reported together.

read (lines, duplicate keys) -> old names -> overrides -> variables -> site -> sections -> rules
-> RunConfig | UsageError
"""

import difflib
import functools
import operator
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from enc.encoder.config import NotBuilt, RunConfig
from enc.encoder.config_checks import rule_problems
from enc.encoder.errors import UsageError

RECIPES = Path(__file__).parent / "recipes"
SITES = Path(__file__).parent.parent / "slurm" / "sites"
COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a config: where it stands, which key, and what to do."""

    key: str
    text: str
    where: str = ""


@dataclass
class Source:
    """A config's raw values, and for each dotted key the place that set it."""

    name: str
    tree: dict[str, Any]
    places: dict[str, str]
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def place(self, key: str) -> str:
        """Return where a key, or the nearest section above it, was set."""
        while key and key not in self.places:
            key = key.rpartition(".")[0]
        return self.places.get(key, "")


@dataclass(frozen=True)
class Loaded:
    """A valid config, and what the user should be told about it."""

    config: RunConfig
    warnings: list[str]


# --- YAML ------------------------------------------------------------------------------------------------------------


_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """YAML whose `1e-4` is a float, whose `no` is a word and whose `24:00:00` is text, as in YAML 1.2."""


_OWN_TAGS = [f"tag:yaml.org,2002:{name}" for name in ("bool", "int", "float")]
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _OWN_TAGS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^[-+]?(?:0b[0-1_]+|0[0-7_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def parse_value(text: str) -> Any:
    """Return the YAML value of a command-line word; a word that is no YAML is text."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError):  # ValueError: a date that there is not
        return text


_A_CONFIG = "a config is a mapping of sections (model:, dataset:, trainer: ...)"
_A_SITE = "a site profile is a mapping of keys of the section launch (slurm:, env:, nproc_per_node: ...)"


def read_yaml(text: str, name: str, kind: str = _A_CONFIG) -> Source:
    """Parse YAML text, noting the line of each key and every key given twice. Raises UsageError on a syntax error."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.YAMLError as error:
        raise _yaml_error(error, name) from None
    if node is not None and not isinstance(node, yaml.MappingNode):
        raise UsageError(f"{name}: {kind}, this is not one.")
    source = Source(name, {}, {})
    if node is not None:
        _refuse_cycles(node, name, (), set())
        _note_lines(node, "", source)
        try:
            source.tree = loader.construct_document(node)
        except (yaml.YAMLError, ValueError) as error:  # ValueError: a date like 2024-13-45
            raise _yaml_error(error, name) from None
    return source


def _yaml_error(error: Exception, name: str) -> UsageError:
    mark = getattr(error, "problem_mark", None)
    place = f"{name}, line {mark.line + 1}, column {mark.column + 1}" if mark else name
    return UsageError(f"{place}: this is not valid YAML: {getattr(error, 'problem', None) or _one_line(error)}.")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _refuse_cycles(node: yaml.Node, name: str, above: tuple[yaml.Node, ...], done: set[yaml.Node]) -> None:
    """Raise UsageError when an alias stands for something that it is a part of."""
    if node in above:
        raise UsageError(f"{name}:{node.start_mark.line + 1}: the anchor is used inside of itself; a config must end.")
    if node not in done and not isinstance(node, yaml.ScalarNode):
        inner = [value for _, value in node.value] if isinstance(node, yaml.MappingNode) else node.value
        for value in inner:
            _refuse_cycles(value, name, (*above, node), done)
        done.add(node)


def _note_lines(node: yaml.MappingNode, prefix: str, source: Source) -> None:
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise UsageError(f"{source.name}:{line}: a list or a mapping is no key; write key: value.")
        key_node.tag = "tag:yaml.org,2002:str" if key_node.tag != _MERGE else _MERGE  # 3: and null: are names too
        key = f"{prefix}{key_node.value}"
        place = f"{source.name}:{line}"
        if key in source.places:
            source.problems.append(Problem(key, f"is given twice, first at {source.places[key]}; keep one", place))
        source.places.setdefault(key, place)
        if isinstance(value_node, yaml.MappingNode):
            _note_lines(value_node, f"{key}.", source)


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


# --- sites -----------------------------------------------------------------------------------------------------------


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


def _lay_site(source: Source) -> None:
    """Fill the section `launch` of a config with the values of its site profile.

    The config's own values win, unless the site was named on the command line: then only other values given there do.
    """
    given, name = _get(source.tree, "launch.site")
    if not given or not isinstance(name, str) or not name:
        return
    path = find_site(name)
    site = read_yaml(_read_text(path), str(path), _A_SITE)
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


# --- old names -------------------------------------------------------------------------------------------------------

_RENAMED = {
    "mixed_precision": "trainer.mixed_precision",
    "trainer.bf16": "trainer.mixed_precision",
    "trainer.seed": "seed",
    "trainer.run_name": "wandb.name",
    "trainer.learning_rate": "optimizer.lr",
    "trainer.warmup_steps": "scheduler.warmup_steps",
    "trainer.max_grad_norm": "trainer.gradient_clipping",
    "trainer.dir": "trainer.output_dir",
    "trainer.train_batch_size": "trainer.per_device_train_batch_size",
    "trainer.eval_batch_size": "trainer.per_device_eval_batch_size",
    "trainer.max_ckpt": "trainer.save_total_limit",
    "dataset.tokenizer_name": "tokenizer.name",
    "dataset.column": "dataset.text_column",
    "dataset.path_to_disk": "dataset.path",
    "dataset.pretraining_prob": "contrastive.pretraining_prob",
    "tokenizer.tokenizer_name_or_path": "tokenizer.name",
    "wandb.log_interval": "trainer.logging_steps",
    "model.name_or_path": "model.name",
    "mteb_task_type": "mteb.task_type",
    "mteb_batch_size": "mteb.batch_size",
    "mteb_pooling": "mteb.pooling",
    "mteb_overwrite_results": "mteb.overwrite_results",
}
_RENAMED |= {f"optimizer.hparams.{key}": f"optimizer.{key}" for key in ("lr", "weight_decay", "betas", "eps")}
_RENAMED |= {
    f"model.{key}": f"glue.{key}"
    for key in ("pretrained_model_path", "pretrained_checkpoint_dir", "pretrained_checkpoint", "allow_random_weights",
                "classifier_dropout")
}  # fmt: skip
_DROPPED = {
    "trainer.remove_unused_columns": "no columns are passed on",
    "trainer.report_to": "TensorBoard is always on, W&B by wandb.enabled",
    "scheduler.num_cycles": "the schedules have one cycle",
}
_ATTENTION_SWITCHES = ("model.flash_attention", "model.use_flash_attention", "model.xformers_attention")
# The old default of these says nothing: NeoBERT writes them into every saved config.
_SILENT: dict[str, Any] = {
    "trainer.max_ckpt": None,
    "trainer.train_batch_size": None,
    "trainer.eval_batch_size": None,
    "trainer.report_to": [],
    "wandb.log_interval": 100,
    "mteb_task_type": "all",
    "mteb_batch_size": 32,
    "mteb_pooling": "mean",
    "mteb_overwrite_results": False,
}


def top_level_names() -> set[str]:
    """Return the names that a config may have without a section: keys, sections and old names."""
    return {*RunConfig.model_fields, "variables", *(old for old in _RENAMED if "." not in old)}


def _get(tree: dict[str, Any], key: str) -> tuple[bool, Any]:
    node: Any = tree
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            return False, None
        node = node[part]
    return True, node


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for part in parents:
        child = tree.get(part)
        tree[part] = child if isinstance(child, dict) else {}
        tree = tree[part]
    tree[last] = value


def _remove(tree: dict[str, Any], key: str) -> Any:
    *parents, last = key.split(".")
    for part in parents:
        tree = tree[part]
    return tree.pop(last)


def apply_old_names(source: Source) -> None:
    """Move values under old names to their present keys, with a warning each; two different values are a problem."""
    for old, why in _DROPPED.items():
        if _get(source.tree, old)[0] and _remove(source.tree, old) != _SILENT.get(old, ...):
            source.warnings.append(f"{old} is ignored: {why}.")
    for old in _ATTENTION_SWITCHES:
        if _get(source.tree, old)[0]:
            on = _remove(source.tree, old)
            _rename(source, old, "model.attn_backend", "flash_attn_varlen" if on else "sdpa")
    for old, new in _RENAMED.items():
        if not _get(source.tree, old)[0] or old == new:
            continue
        value = _remove(source.tree, old)
        if not (old in _SILENT and value == _SILENT[old]):
            _rename(source, old, new, value)
    if _get(source.tree, "optimizer.hparams") == (True, {}):
        _remove(source.tree, "optimizer.hparams")


def _rename(source: Source, old: str, new: str, value: Any) -> None:
    given, present = _get(source.tree, new)
    place = source.place(old)
    overrides = place == COMMAND_LINE != source.place(new)
    if given and present != value and not overrides:
        text = f"is {value!r}, but it is an old name of {new}, which is {present!r}; keep one of them"
        source.problems.append(Problem(old, text, place))
        return
    source.warnings.append(f"{old} is an old name: use {new}.")
    _set(source.tree, new, value)
    source.places[new] = place


# --- overrides -------------------------------------------------------------------------------------------------------


def parse_overrides(words: list[str]) -> dict[str, Any]:
    """Return ``{dotted key: value}`` of ``--a.b v``, ``--a.b=v`` and ``a.b=v``. Raises UsageError on anything else."""
    overrides: dict[str, Any] = {}
    rest = iter(words)
    for word in rest:
        key, equals, text = word.removeprefix("--").partition("=")
        if not equals:
            if not word.startswith("--") or not key:
                raise UsageError(f"{word!r} is neither an option nor an override; write section.key=value.")
            following = next(rest, None)
            if following is None or following.startswith("--"):
                raise UsageError(f"{word} has no value; write {word}=VALUE.")
            text = following
        if not all(key.split(".")):
            raise UsageError(f"{word!r} names no key; write section.key=value.")
        overrides[key] = parse_value(text)
    return overrides


def _apply_overrides(source: Source, overrides: dict[str, Any]) -> None:
    for key, value in overrides.items():
        _set(source.tree, key, value)
        for below in [k for k in source.places if k.startswith(f"{key}.")]:
            del source.places[below]
        source.places[key] = COMMAND_LINE


# --- variables -------------------------------------------------------------------------------------------------------

_WHOLE = re.compile(r"^\$variables\.([\w.]+)$|^\$\{variables\.([\w.]+)\}$|^\{\$variables\.([\w.]+)\}$")
_INLINE = re.compile(r"\$\{variables\.([\w.]+)\}|\{\$variables\.([\w.]+)\}")


def substitute_variables(source: Source) -> None:
    """Replace references to the `variables:` mapping: a whole-string one keeps its type, one in a text becomes text."""
    variables = source.tree.pop("variables", None) or {}
    if not isinstance(variables, dict):
        text = f"is {variables!r}, must be a section of name: value lines"
        source.problems.append(Problem("variables", text, source.place("variables")))
        variables = {}
    source.tree = _substituted(source.tree, variables, source, "", ())


def _substituted(value: Any, variables: dict[str, Any], source: Source, key: str, trail: tuple[str, ...]) -> Any:
    if isinstance(value, dict):
        return {k: _substituted(v, variables, source, f"{key}.{k}" if key else str(k), trail) for k, v in value.items()}
    if isinstance(value, list):
        return [_substituted(v, variables, source, key, trail) for v in value]
    if not isinstance(value, str):
        return value

    def look_up(name: str) -> Any:
        found, result = _get(variables, name)
        if name in trail:
            text = f"refers to itself: {' -> '.join((*trail[trail.index(name) :], name))}"
        elif not found:
            text = f"refers to variables.{name}, which is not defined{did_you_mean(name, _names(variables))}"
        else:
            return _substituted(result, variables, source, key, (*trail, name))
        source.problems.append(Problem(key, text, source.place(key)))
        return None

    whole = _WHOLE.match(value)
    if whole:
        return look_up(next(group for group in whole.groups() if group))
    return _INLINE.sub(lambda match: str(look_up(match[1] or match[2])), value)


def _names(tree: dict[str, Any], prefix: str = "") -> list[str]:
    inner = [name for k, v in tree.items() if isinstance(v, dict) for name in _names(v, f"{prefix}{k}.")]
    return [f"{prefix}{k}" for k in tree] + inner


# --- sections --------------------------------------------------------------------------------------------------------


def all_fields(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every dotted key of the schema with its field, once; sections come before their keys."""
    for name, info in model.model_fields.items():
        yield f"{prefix}{name}", info
        inner: dict[str, FieldInfo] = {}
        for kind in section_classes(info):
            inner = dict(all_fields(kind, f"{prefix}{name}.")) | inner
        yield from inner.items()


def section_classes(info: FieldInfo) -> list[type[BaseModel]]:
    """Return the section classes that a field may have, several for the models' section; none for a plain value."""
    kinds = [getattr(kind, "__origin__", kind) for kind in (info.annotation, *get_args(info.annotation))]
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]


def did_you_mean(word: str, known: list[str]) -> str:
    """Return `; did you mean ...?` when a known word is close, else an empty text."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.75)
    return f"; did you mean {close[0]}?" if close else ""


def _nearest_key(key: str) -> str:
    """Suggest a known key: the same last word in another section first, then the closest spelling."""
    if "." not in key and (hint := did_you_mean(key, list(RunConfig.model_fields))):
        return hint
    known = [name for name, info in all_fields() if not section_classes(info)]
    elsewhere = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    if elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    section = key.rpartition(".")[0]
    inside = [name for name, info in all_fields() if section_classes(info) and name.rpartition(".")[0] == section]
    return did_you_mean(key, inside) or did_you_mean(key, known)


def _message(error: Any, path: list[str | int]) -> str:
    """Return what a pydantic error at a path of the tree means, in words."""
    given, context, key = error["input"], error.get("ctx", {}), ".".join(map(str, path))
    shown = "empty (null)" if given is None else repr(given)
    match error["type"]:
        case "extra_forbidden" if len(path) == 2 and key in dict(all_fields()) and path[0] == "model":
            return f"is no key of model.type {error['loc'][1]}"
        case "extra_forbidden" if key in dict(all_fields()):  # written `trainer.max_steps: 3`
            section, _, name = key.rpartition(".")
            return f"is no key of a file in one word; write {section}: and, indented below it, {name}:"
        case "extra_forbidden":
            return f"is not a key{_nearest_key(key)}"
        case "literal_error":
            hint = " (fp16 is not supported; bf16 needs no loss scaling)" if given == "fp16" else ""
            return f"is {shown}, allowed: {context['expected']}{hint}"
        case "int_type" | "int_from_float" | "int_parsing":
            whole = f"; write {int(given)}" if isinstance(given, float) and given.is_integer() else ""
            return f"is {shown}, must be a whole number{whole}"
        case "float_type" | "float_parsing":
            return f"is {shown}, must be a number"
        case "bool_type" | "bool_parsing":
            return f"is {shown}, must be true or false"
        case "string_type" if key.startswith("launch.env."):  # it may be a secret
            return "is no text; put the value in quotes"
        case "value_error":
            return f"is {shown}, {context['error']}"
        case "string_type":
            return f"is {shown}, must be text (put it in quotes)"
        case "string_pattern_mismatch":
            meaning = next(info.description or "" for name, info in all_fields() if name == key)
            return f"is {shown}, but it is this: {meaning.partition('. ')[0].rstrip('.')}"
        case "model_type" | "model_attributes_type":
            return f"is {shown}, must be a section of key: value lines"
        case _:
            text = error["msg"].removeprefix("Input should").removeprefix("Value should")
            return f"is {shown}, must{text}" if text != error["msg"] else f"is {shown}: {text[0].lower()}{text[1:]}"


def _validate(source: Source) -> tuple[RunConfig, set[str]]:
    """Return the config with every bad value at its default, and the keys that were bad."""
    bad = {problem.key for problem in source.problems}
    tree = source.tree
    while True:
        try:
            return RunConfig.model_validate(tree), bad
        except ValidationError as error:
            # all paths first: a key with two errors is gone from the tree when the second one is looked at
            for item, path in [(item, _known_path(tree, item["loc"])) for item in error.errors()]:
                key = ".".join(map(str, path))
                if key not in bad:
                    bad.add(key)
                    source.problems.append(Problem(key, _message(item, path), source.place(key)))
                *parents, last = path
                section: Any = functools.reduce(operator.getitem, parents, tree)  # type: ignore[arg-type]
                section.pop(last, None)


def _known_path(tree: dict[str, Any], loc: tuple[str | int, ...]) -> list[str | int]:
    """Cut a pydantic location to the part that names a key of the tree (it goes on into lists and unions).

    In the section `model` pydantic puts the model's type between section and key.
    """
    path: list[str | int] = []
    node: Any = tree
    for part in (*loc[:1], *loc[2:]) if loc[0] == "model" else loc:
        if not isinstance(node, dict) or part not in node:
            break
        path.append(part)
        node = node[part]
    return path or list(loc[:1])


def _marker_problems(config: RunConfig, source: Source) -> None:
    """Refuse values of features that are not built; warn about values that change nothing."""
    for key, info in all_fields():
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part, ...)  # there is no such key in another model's section
        default = info.get_default(call_default_factory=True)
        if value in (default, ...) or not source.place(key):
            continue
        for mark in info.metadata:
            if isinstance(mark, NotBuilt):
                text = f"is {value!r}, but {mark.what} is not built yet; leave it at {default!r}"
                source.problems.append(Problem(key, text, source.place(key)))
            elif hasattr(mark, "why"):
                source.warnings.append(f"{key} has no effect: {mark.why}.")


# --- the whole way ---------------------------------------------------------------------------------------------------


def raise_problems(name: str, problems: list[Problem]) -> None:
    """Raise UsageError that lists the problems of the thing called `name`, in the order of its lines; none is fine."""
    if not problems:
        return
    lines = [_line(problem) for problem in sorted(problems, key=_in_order)]
    if len(lines) == 1:
        raise UsageError(lines[0])
    raise UsageError(f"{name} has {len(lines)} problems:\n" + "\n".join(f"- {line}" for line in lines))


def _line(problem: Problem) -> str:
    place = f"{problem.where}: " if problem.where else ""
    return f"{place}{problem.key} {problem.text}{'' if problem.text.endswith('?') else '.'}"


def _in_order(problem: Problem) -> tuple[bool, str, int, str]:
    file, _, line = problem.where.rpartition(":")
    return (not line.isdigit(), file, int(line) if line.isdigit() else 0, problem.key)


def load_config(name: str, overrides: dict[str, Any] | None = None) -> Loaded:
    """Load a config file or a recipe and apply overrides ``{dotted key: value}``.

    Raises UsageError that lists every problem: file and line, key, what was given, what is allowed.
    """
    path = find_config(name)
    source = _read_source(_read_text(path), str(path), overrides)
    _lay_site(source)
    return _checked(source)


def load_run(run_dir: Path) -> RunConfig:
    """Load the config of a run folder. Raises UsageError when it cannot be read or is not valid."""
    path = run_dir / "config.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path} cannot be read: {error}. It is the run's own config; take it from a checkpoint."
        ) from None
    return load_text(text, str(path)).config


def load_text(text: str, name: str, overrides: dict[str, Any] | None = None) -> Loaded:
    """Load a config from YAML text, without a site profile; `name` stands for it in messages.

    Raises UsageError as `load_config` does.
    """
    return _checked(_read_source(text, name, overrides))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as text: {error}.") from None


def _read_source(text: str, name: str, overrides: dict[str, Any] | None) -> Source:
    source = read_yaml(text, name)
    apply_old_names(source)
    _apply_overrides(source, overrides or {})
    apply_old_names(source)  # an override may use an old name too
    substitute_variables(source)
    return source


def _checked(source: Source) -> Loaded:
    config, bad = _validate(source)
    _marker_problems(config, source)
    for keys, sentence in rule_problems(config):
        if not bad.intersection(keys):
            source.problems.append(Problem(keys[0], sentence, source.place(keys[0])))
    raise_problems(source.name, source.problems)
    return Loaded(config, source.warnings)
