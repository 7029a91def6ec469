"""A command line of annotated-mpnet as a config: every flag of `pretrain-mpnet`, and the keys that it becomes.

    words ──read──▶ Command (a value for every flag) ──config_keys──▶ {dotted key: value} ──config_yaml──▶ text
                                                     ──notes──▶ what has no key, or works differently here

`FLAGS` is the one table of it: the parser, the conversion and the table in docs/mpnet.md come from its rows. The
file is long because the table is: 55 flags, each with what it becomes, read best in one place.
"""

import argparse
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn, get_args

import yaml

from enc.encoder.config.fields import all_fields
from enc.encoder.config.messages import raise_problems
from enc.encoder.config.yaml_source import Problem, parse_value
from enc.encoder.errors import UsageError
from enc.encoder.models.mpnet.config import MpnetConfig
from enc.encoder.run.config import WANDB_ID
from enc.encoder.spelling import did_you_mean

DEFAULT_DATASET = "HuggingFaceFW/fineweb-edu"

# What annotated-mpnet always does, without a flag for it.
ALWAYS: dict[str, Any] = {
    "objective": "mpnet",
    "model.type": "mpnet",
    "datacollator.mlm_probability": 0.15,
    "datacollator.whole_word": True,
    "datacollator.pack_sequences": True,
    "optimizer.name": "adamw",
    "optimizer.decay_embeddings": True,
    "scheduler.name": "polynomial_decay",
    "trainer.mixed_precision": "bf16",
}


@dataclass(frozen=True)
class Command:
    """A command line that was read: the value of every flag by its first name, and the flags that were given."""

    values: dict[str, Any]
    given: frozenset[str]

    def __getitem__(self, flag: str) -> Any:
        return self.values[flag]

    @property
    def uses_files(self) -> bool:
        """Whether text is read from files instead of a hub dataset."""
        return self["--train-dir"] is not None

    @property
    def evaluates(self) -> bool:
        """Whether there is text to evaluate on."""
        return self.uses_files or self["--eval-samples"] > 0

    @property
    def saves_by_interval(self) -> bool:
        """Whether checkpoints of an interval are written, and not deleted at once."""
        interval: int = self["--checkpoint-interval"]
        return interval > 0 and self["--keep-checkpoints"] != 0


Conversion = Callable[[Command], dict[str, Any]]


@dataclass(frozen=True)
class Flag:
    """A flag of `pretrain-mpnet`, with its other spellings, and what becomes of it.

    Without a `conversion` its value goes under its key as it is. Without a key its `note` is told when it is given.
    """

    names: str
    kind: type
    default: Any
    keys: str = ""
    note: str = ""
    conversion: Conversion | None = None
    least: float | None = None
    above: float | None = None
    below: float | None = None

    @property
    def name(self) -> str:
        return self.names.split()[0]

    def converted(self, command: Command) -> dict[str, Any]:
        """Return the keys that this flag of a command line decides."""
        if self.conversion:
            return self.conversion(command)
        value = command[self.name]
        return {self.keys: value} if self.keys and value is not None else {}


# --- flags that are more than one key, or another value -------------------------------------------------------------


def _positions(command: Command) -> dict[str, Any]:
    return {"model.max_position_embeddings": command["--max-positions"] or command["--max-tokens"]}


def _dataset(command: Command) -> dict[str, Any]:
    return {} if command.uses_files else {"dataset.name": command["--dataset-name"] or DEFAULT_DATASET}


def _column(command: Command) -> dict[str, Any]:
    return {} if command.uses_files else {"dataset.text_column": command["--text-field"]}


def _held_out(command: Command) -> dict[str, Any]:
    count = command["--eval-samples"]
    return {} if command.uses_files or not count else {"dataset.eval_samples": count, "dataset.test_samples": count}


def _shortest(command: Command) -> dict[str, Any]:
    return {} if command.uses_files else {"dataset.min_text_length": max(1, command["--min-text-length"])}


def _warmup(command: Command) -> dict[str, Any]:
    steps = command["--warmup-updates"]
    return {"scheduler.warmup_percent": 10} if steps is None else {"scheduler.warmup_steps": steps}


def _final_lr(command: Command) -> dict[str, Any]:
    ratio = command["--end-learning-rate"] / command["--lr"]
    return {"scheduler.final_lr_ratio": float(f"{ratio:.12g}")}  # 6e-5 / 6e-4 is 0.1, not 0.09999999999999999


def _betas(command: Command) -> dict[str, Any]:
    return {"optimizer.betas": [command["--beta1"], command["--beta2"]]}


def _saves(command: Command) -> dict[str, Any]:
    if command.saves_by_interval:
        saves = {"trainer.save_strategy": "steps", "trainer.save_steps": command["--checkpoint-interval"]}
    else:
        saves = {"trainer.save_strategy": "best" if command.evaluates else "no"}
    return saves | ({"trainer.metric_for_best_model": "eval_loss"} if command.evaluates else {})


def _kept(command: Command) -> dict[str, Any]:
    """Of checkpoints that are saved for being the best only the last is kept, as annotated-mpnet has one file of it."""
    count = command["--keep-checkpoints"] if command.saves_by_interval else 1
    return {"trainer.save_total_limit": None if count == -1 else count}


def _resumed(command: Command) -> dict[str, Any]:
    if not command["--resume"]:
        return {}
    return {"trainer.resume_from_checkpoint": command["--resume-checkpoint"] or "latest"}


def _evaluations(command: Command) -> dict[str, Any]:
    interval, steps = command["--checkpoint-interval"], command["--eval-interval-steps"]
    if steps is None:
        steps = interval if interval > 0 else 5000
    return {"trainer.eval_steps": steps if steps > 0 else command["--total-updates"]}


# --- the table -------------------------------------------------------------------------------------------------------

FLAGS = (
    # model
    Flag("--encoder-layers", int, 12, "model.num_hidden_layers", least=1),
    Flag("--encoder-embed-dim", int, 768, "model.hidden_size", "a multiple of the number of heads", least=1),
    Flag("--encoder-ffn-dim", int, 3072, "model.intermediate_size", least=1),
    Flag("--encoder-attention-heads", int, 12, "model.num_attention_heads", least=1),
    Flag("--dropout", float, 0.1, "model.dropout_prob", least=0, below=1),
    Flag("--attention-dropout", float, 0.1, "model.attention_dropout_prob", least=0, below=1),
    Flag("--activation-dropout", float, 0.1, "model.activation_dropout_prob", least=0, below=1),
    Flag("--normalize-before -prenorm", bool, False, "model.normalize_before"),
    Flag("--activation-fn -activation", str, "gelu", "model.hidden_act"),
    # positions
    Flag("--max-tokens", int, 512, "dataset.max_seq_length", "longer documents are cut, nothing is dropped", least=8),
    Flag(
        "--max-positions", int, None, "model.max_position_embeddings",
        "unset: as `--max-tokens`; may be more, to grow into", _positions, least=1,
    ),
    Flag(
        "--relative-attention-num-buckets -num_buckets", int, None, "model.relative_attention_num_buckets",
        "unset: 32 for every 512 positions", least=4,
    ),
    Flag(
        "--relative-attention-max-distance", int, None, "model.relative_attention_max_distance",
        "unset: 128 for every 512 positions", least=1,
    ),
    # text
    Flag("--tokenizer-name", str, "microsoft/mpnet-base", "tokenizer.name"),
    Flag(
        "--dataset-name", str, None, "dataset.name",
        f"unset and no files: `{DEFAULT_DATASET}`; tokenised before training, not streamed", _dataset,
    ),
    Flag("--text-field", str, "text", "dataset.text_column", "not with files", _column),
    Flag("--buffer-size", int, 10000, "", "rows are shuffled over the whole epoch", least=1),
    Flag(
        "--eval-samples", int, 500, "dataset.eval_samples dataset.test_samples",
        "0: nothing is evaluated; not with files", _held_out, least=0,
    ),
    Flag("--min-text-length", int, 64, "dataset.min_text_length", "0 becomes 1; not with files", _shortest, least=0),
    Flag("--train-dir", str, None, "dataset.path", "a document a line; rows of all files are shuffled together"),
    Flag("--valid-file", str, None, "dataset.validation_file"),
    Flag("--test-file", str, None, "dataset.test_file"),
    # training
    Flag("--total-updates", int, 10000, "trainer.max_steps", least=1),
    Flag("--batch-size", int, 16, "trainer.per_device_train_batch_size", least=1),
    Flag("--update-freq -gc_steps", int, 8, "trainer.gradient_accumulation_steps", least=1),
    Flag("--gradient-checkpointing", bool, False, "trainer.gradient_checkpointing"),
    Flag("--compile", bool, False, "trainer.torch_compile"),
    Flag("--seed", int, 12345, "seed", least=0),
    Flag("--num-workers", int, 0, "dataset.num_workers", "resume is exact with any number", least=0),
    # learning rate
    Flag("--lr", float, 6e-4, "optimizer.lr", above=0),
    Flag(
        "--warmup-updates -warmup_steps", int, None, "scheduler.warmup_steps",
        "unset: `scheduler.warmup_percent: 10`", _warmup, least=0,
    ),
    Flag(
        "--end-learning-rate -end_lr", float, 0.0, "scheduler.final_lr_ratio", "as a share of `--lr`", _final_lr,
        least=0,
    ),
    Flag("--power", float, 1.0, "scheduler.power", above=0),
    # optimizer
    Flag("--beta1", float, 0.9, "optimizer.betas", "the first of the two", _betas, least=0, below=1),
    Flag("--beta2", float, 0.98, "optimizer.betas", "the second", _betas, least=0, below=1),
    Flag("--weight-decay -wd", float, 0.01, "optimizer.weight_decay", least=0),
    Flag("--adam-eps", float, 1e-6, "optimizer.eps", above=0),
    Flag("--clip-grad-norm -grad_clip", float, 1.0, "trainer.gradient_clipping", "0 is off", least=0),
    # checkpoints
    Flag("--checkpoint-dir", str, "./checkpoints", "trainer.output_dir", "the run folder"),
    Flag(
        "--checkpoint-interval --save-steps --save_steps", int, -1, "trainer.save_strategy trainer.save_steps",
        "`steps`; 0 or less: `best`. The best is always kept: `trainer.metric_for_best_model: eval_loss`", _saves,
    ),
    Flag(
        "--keep-checkpoints", int, -1, "trainer.save_total_limit",
        "-1: `null`, all; 0: `trainer.save_strategy: best`, as none of an interval would be left, and then 1", _kept,
        least=-1,
    ),
    Flag("--save-optimizer-state", bool, False, "", "optimizer and schedule are in every checkpoint"),
    # resuming
    Flag("--resume", bool, False, "trainer.resume_from_checkpoint", "`latest`", _resumed),
    Flag(
        "--resume-checkpoint", str, None, "trainer.resume_from_checkpoint",
        "a checkpoint of enc; a .pt of annotated-mpnet goes through `enc ckpt import FILE --out RUN` first", _resumed,
    ),
    Flag("--trust-checkpoint", bool, False, "", "an option of `enc ckpt import`, which reads annotated-mpnet's files"),
    Flag("--hf-model-path", str, None, "model.init_from", "the flags above must give that model's sizes"),
    # evaluation and logging
    Flag(
        "--eval-interval-steps", int, None, "trainer.eval_steps",
        "unset: the checkpoint interval, or 5000 without one; 0 or less: `--total-updates`", _evaluations,
    ),
    Flag("--tensorboard-log-dir -log_dir", str, None, "trainer.tensorboard_dir", "unset: in the run folder"),
    Flag("--logging-steps --logging_steps", int, 25, "trainer.logging_steps", least=1),
    Flag("--debug", bool, False, "", "use `enc --debug`"),
    Flag("--wandb", bool, False, "wandb.enabled"),
    Flag("--wandb-project", str, "annotated-mpnet", "wandb.project"),
    Flag("--wandb-name", str, None, "wandb.name"),
    Flag("--wandb-id", str, None, "wandb.id"),
    Flag("--wandb-watch", bool, False, "", "norms of gradients and weights are always logged"),
)  # fmt: skip


# --- reading a command line ------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"This is no command line of pretrain-mpnet: {message}. docs/mpnet.md lists its flags.")


def _parser() -> _Parser:
    parser = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
    for flag in FLAGS:
        # numbers are read below, so that all mistakes are told together
        parser.add_argument(*flag.names.split(), dest=flag.name, action="store_true" if flag.kind is bool else "store")
    return parser


def read(words: list[str]) -> Command:
    """Read the words after `pretrain-mpnet`. Raises UsageError that lists every problem of them."""
    if "--" in words:
        raise UsageError("A second -- stands among the flags; write one, right after from-mpnet.")
    found, unknown = _parser().parse_known_args(words)
    given = vars(found)
    problems = list(_unknown_words(unknown))
    values = {flag.name: flag.default for flag in FLAGS}
    for flag in FLAGS:
        if flag.name in given:
            values[flag.name], wrong = _value(flag, given[flag.name])
            problems += [Problem(flag.name, wrong)] if wrong else []
    bad = {problem.key for problem in problems}
    command = Command(values, frozenset(given))
    problems += [Problem(flags[0], text) for flags, text in _broken_rules(command) if not bad.intersection(flags)]
    raise_problems("The command line of pretrain-mpnet", problems)
    return command


def _unknown_words(words: list[str]) -> Iterator[Problem]:
    names = [name for flag in FLAGS for name in flag.names.split()]
    for before, word in zip(["", *words], words, strict=False):
        if word.startswith("-"):
            name = word.partition("=")[0]
            yield Problem(name, f"is no flag of pretrain-mpnet{did_you_mean(name, names) or '; leave it out'}")
        elif not before.startswith("-"):  # else it is the value of the unknown flag
            yield Problem(repr(word), "belongs to no flag; leave it out")


def _value(flag: Flag, given: Any) -> tuple[Any, str]:
    """Return the value of a flag's text, and what is wrong with it; its default where something is."""
    if flag.kind is bool:
        return True, ""
    if flag.kind is str:
        wrong = _wrong_text(flag, given)
        return flag.default if wrong else given or flag.default, wrong
    try:
        number = flag.kind(given)
    except ValueError:
        return flag.default, f"is {given!r}, must be a {'whole ' if flag.kind is int else ''}number"
    wrong = _wrong_number(flag, number)
    return flag.default if wrong else number, wrong


def _wrong_text(flag: Flag, text: str) -> str:
    if not text.isprintable():
        return f"is {text!r}, must be one line of printable characters"
    if flag.keys == "wandb.id" and not re.fullmatch(WANDB_ID, text):
        return f"is {text!r}, must be letters, digits, - and _"
    return "is empty; give it a value" if not text and flag.default is not None else ""


def _wrong_number(flag: Flag, number: float) -> str:
    if not math.isfinite(number):
        return f"is {number:g}, must be a finite number"
    within = (
        (flag.least is None or number >= flag.least)
        and (flag.above is None or number > flag.above)
        and (flag.below is None or number < flag.below)
    )
    return "" if within else f"is {number:g}, must be {_limits(flag)}"


def _limits(flag: Flag) -> str:
    bounds = [("at least", flag.least), ("above", flag.above), ("below", flag.below)]
    return " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)


_FILES = ("--train-dir", "--valid-file", "--test-file")
_ACTIVATIONS = get_args(MpnetConfig.model_fields["hidden_act"].annotation)


def _broken_rules(command: Command) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield (flags involved, what is wrong and what to do) for each rule that spans flags; the first flag is shown."""
    yield from _source_rules(command)
    yield from _model_rules(command)
    total, warmup = command["--total-updates"], command["--warmup-updates"]
    if warmup is not None and warmup > total:
        yield ("--warmup-updates", "--total-updates"), f"is {warmup}, more than the {total} of --total-updates"
    end, peak = command["--end-learning-rate"], command["--lr"]
    if end > peak:
        yield ("--end-learning-rate", "--lr"), f"is {end:g}, more than the {peak:g} of --lr, from which it decays"
    resumes = [flag for flag in ("--resume", "--resume-checkpoint") if command[flag]]
    if command["--hf-model-path"] and resumes:
        yield ("--hf-model-path", *resumes), f"and {resumes[0]} exclude each other: weights have one origin; keep one"
    if resumes == ["--resume-checkpoint"]:
        yield ("--resume-checkpoint",), "needs --resume; add it"


def _source_rules(command: Command) -> Iterator[tuple[tuple[str, ...], str]]:
    files = [flag for flag in _FILES if command[flag]]
    missing = [flag for flag in _FILES if not command[flag]]
    if files and command["--dataset-name"]:
        yield ("--dataset-name", *files), f"and {files[0]} exclude each other: text has one source; keep one"
    elif files and missing:
        yield (files[0], *missing), f"needs {' and '.join(missing)} too; name all three, or none and --dataset-name"


def _model_rules(command: Command) -> Iterator[tuple[tuple[str, ...], str]]:
    width, heads = command["--encoder-embed-dim"], command["--encoder-attention-heads"]
    if width % heads:
        yield (
            ("--encoder-embed-dim", "--encoder-attention-heads"),
            f"is {width}, which --encoder-attention-heads {heads} does not divide; change one of them",
        )
    activation = command["--activation-fn"]
    if activation not in _ACTIVATIONS:
        yield ("--activation-fn",), f"is {activation!r}, allowed: {', '.join(_ACTIVATIONS)}"
    tokens, positions = command["--max-tokens"], command["--max-positions"] or command["--max-tokens"]
    if positions < tokens:
        yield (
            ("--max-positions", "--max-tokens"),
            f"is {positions}, but rows have the {tokens} tokens of --max-tokens; leave it out",
        )
    flags = ("--relative-attention-max-distance", "--relative-attention-num-buckets", "--max-positions", "--max-tokens")
    model = MpnetConfig.model_construct(
        max_position_embeddings=positions,
        relative_attention_max_distance=command[flags[0]],
        relative_attention_num_buckets=command[flags[1]],
    )
    if model.max_distance <= model.num_buckets // 4:
        yield (
            flags,
            f"is {model.max_distance}, must be above {model.num_buckets // 4}, a quarter of the {model.num_buckets} "
            "buckets: so many are of one distance each",
        )


# --- what comes of it ------------------------------------------------------------------------------------------------


def config_keys(command: Command) -> dict[str, Any]:
    """Return ``{dotted key: value}`` of a command line, in the order of the schema."""
    keys = dict(ALWAYS)
    for flag in FLAGS:
        keys |= flag.converted(command)
    return {key: keys[key] for key, _ in all_fields() if key in keys}


# What belongs to one start, folders of another machine among them; and a best checkpoint needs text to evaluate on.
_OF_ONE_START = (
    "dataset.path", "dataset.validation_file", "dataset.test_file", "tokenizer.name", "model.init_from",
    "trainer.output_dir", "trainer.tensorboard_dir", "trainer.resume_from_checkpoint", "trainer.save_strategy",
    "trainer.metric_for_best_model",
)  # fmt: skip


def keys_of_args(args: dict[str, Any]) -> dict[str, Any]:
    """Return ``{dotted key: value}`` of the arguments that a checkpoint of annotated-mpnet keeps, to go on with it.

    Rows stay one document each, as they were. Raises UsageError when an argument has a value that no flag takes.
    """
    values, problems = {}, []
    for flag in FLAGS:
        given = args.get(flag.name.removeprefix("--").replace("-", "_"))
        value, wrong = (flag.default, "") if given is None or given is False else _value(flag, str(given))
        values[flag.name] = value
        problems += [Problem(flag.name, wrong)] if wrong else []
    raise_problems("The arguments in the checkpoint", problems)
    keys = config_keys(Command(values, frozenset()))
    return {key: keys[key] for key in keys if key not in _OF_ONE_START} | {"datacollator.pack_sequences": False}


class _Dumper(yaml.SafeDumper):
    """Lists in one line, and quotes around text that a config's reader would take for something else."""


def _text_node(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if parse_value(text) == text else '"')


_Dumper.add_representer(str, _text_node)
_Dumper.add_representer(
    list, lambda dumper, it: dumper.represent_sequence("tag:yaml.org,2002:seq", it, flow_style=True)
)


def config_yaml(command: Command) -> str:
    """Return the config of a command line: the keys that it decides, by section."""
    tree: dict[str, Any] = {}
    for key, value in config_keys(command).items():
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = value
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6)


def notes(command: Command) -> Iterator[str]:
    """Yield what a user of these flags should know: what has no key, and what works differently here."""
    for flag in FLAGS:
        if flag.name in command.given and not flag.keys:
            yield f"{flag.name} has no key: {flag.note}."
    yield from _source_notes(command)
    tokens, positions = command["--max-tokens"], command["--max-positions"]
    if positions and positions > tokens:
        yield f"Rows have {tokens} tokens, the model has positions for {positions} to grow into."
    if command["--num-workers"]:
        yield "Resuming is exact here with any --num-workers."
    if command["--checkpoint-interval"] > 0 and not command.saves_by_interval:
        yield (
            "--keep-checkpoints 0 deletes interval checkpoints as soon as they are written, so none are: "
            "--checkpoint-interval decides evaluations only."
        )
    if command["--hf-model-path"]:
        yield "--hf-model-path must be a folder here: `hf download NAME --local-dir FOLDER` makes one of a hub name."
    if command["--resume"]:
        yield (
            f"--resume goes on with a run of enc in {command['--checkpoint-dir']}; a .pt of annotated-mpnet goes "
            "through `enc ckpt import FILE --out RUN` first."
        )


def _source_notes(command: Command) -> Iterator[str]:
    if not command.evaluates:
        yield "Without --eval-samples nothing is evaluated, so there is no best checkpoint; the last step is saved."
    if not command.uses_files:
        sample = "; dataset.config: sample-10BT takes a part" if not command["--dataset-name"] else ""
        name = command["--dataset-name"] or DEFAULT_DATASET
        yield f"{name} is downloaded and tokenised before training starts, not streamed{sample}."
        return
    for flag in ("--text-field", "--eval-samples", "--min-text-length"):
        if flag in command.given:
            yield f"{flag} has no effect with --train-dir."
    yield "Of --train-dir the files named .txt, .md, .rst or .text are plain text; rename others."


def flags_table() -> str:
    """Return the table of docs/mpnet.md: a row a flag, and what becomes of it."""
    kinds = {int: "integer", float: "number", str: "text", bool: "switch"}
    rows = [
        f"| {_code(flag.names)} | {kinds[flag.kind]} | {_default(flag)} | {_code(flag.keys) or 'none'} | {flag.note} |"
        for flag in FLAGS
    ]
    return "\n".join(["| flag | type | default | key | note |", "|---|---|---|---|---|", *rows]) + "\n"


def _code(words: str) -> str:
    return ", ".join(f"`{word}`" for word in words.split())


def _default(flag: Flag) -> str:
    if flag.default is None or flag.kind is bool:
        return "unset" if flag.default is None else "off"
    return f"`{flag.default:g}`" if flag.kind is float else f"`{flag.default}`"
