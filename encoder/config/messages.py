"""What is wrong with a config, in words."""

from typing import Any

from enc.encoder.config.fields import all_fields, section_classes
from enc.encoder.config.schema import RunConfig
from enc.encoder.config.yaml_source import Problem
from enc.encoder.errors import UsageError
from enc.encoder.spelling import did_you_mean


def _nearest_key(key: str) -> str:
    """Suggest a known key: the same last word in another section first, then the closest spelling."""
    if "." not in key and (hint := did_you_mean(key, RunConfig.model_fields)):
        return hint
    known = [name for name, info in all_fields() if not section_classes(info)]
    elsewhere = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    if elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    section = key.rpartition(".")[0]
    inside = [name for name, info in all_fields() if section_classes(info) and name.rpartition(".")[0] == section]
    return did_you_mean(key, inside) or did_you_mean(key, known)


def message_of(error: Any, path: list[str | int]) -> str:
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
