"""YAML as raw values with the place that set each key, and its problems."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from enc.encoder.errors import UsageError

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


_MERGE = "tag:yaml.org,2002:merge"


class YamlLoader(yaml.SafeLoader):
    """YAML whose `1e-4` is a float, whose `no` is a word and whose `24:00:00` is text, as in YAML 1.2."""


_OWN_TAGS = [f"tag:yaml.org,2002:{name}" for name in ("bool", "int", "float")]
YamlLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _OWN_TAGS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^[-+]?(?:0b[0-1_]+|0[0-7_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)$"),
    list("-+0123456789"),
)
YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def parse_value(text: str) -> Any:
    """Return the YAML value of a command-line word; a word that is no YAML, or has a YAML comment, is text."""
    try:
        node = YamlLoader(text).get_single_node()
        unread = text if node is None else text[node.end_mark.index :]
        return text if unread.strip() else yaml.load(text, Loader=YamlLoader)
    except (yaml.YAMLError, ValueError):  # ValueError: a date that there is not
        return text


_A_CONFIG = "a config is a mapping of sections (model:, dataset:, trainer: ...)"
A_SITE = "a site profile is a mapping of keys of the section launch (slurm:, env:, nproc_per_node: ...)"


def read_yaml(text: str, name: str, kind: str = _A_CONFIG) -> Source:
    """Parse YAML text, noting the line of each key and every key given twice. Raises UsageError on a syntax error."""
    try:
        loader = YamlLoader(text)
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


def get_key(tree: dict[str, Any], key: str) -> tuple[bool, Any]:
    node: Any = tree
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            return False, None
        node = node[part]
    return True, node


def set_key(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for part in parents:
        child = tree.get(part)
        tree[part] = child if isinstance(child, dict) else {}
        tree = tree[part]
    tree[last] = value


def remove_key(tree: dict[str, Any], key: str) -> Any:
    *parents, last = key.split(".")
    for part in parents:
        tree = tree[part]
    return tree.pop(last)


def read_config_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as text: {error}.") from None
