"""Loading a config: YAML, old names, variables, overrides; and what the schema promises."""

import ast
import math
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import annotated_types
import pytest
import yaml
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from places import GOLDEN, ROOT
from pydantic.fields import FieldInfo
from running import Enc

from enc.encoder.config import not_built
from enc.encoder.config.fields import all_fields, keeps_numbers, mark_of, section_classes
from enc.encoder.config.load import load_config, load_text
from enc.encoder.config.overrides import parse_overrides
from enc.encoder.config.schema import RunConfig, differences, flatten
from enc.encoder.config.sites import RECIPES
from enc.encoder.config.yaml_source import parse_value, set_key
from enc.encoder.errors import UsageError
from enc.encoder.run.config import TrainerConfig
from enc.encoder.section import NoEffect
from enc.encoder.tasks import TASKS


def load(text: str = "", *words: str) -> RunConfig:
    return load_text(text, "cfg.yaml", parse_overrides(list(words))).config


def value_of(config: RunConfig, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


# --- overrides -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["--optimizer.lr", "3e-4"],
        ["--optimizer.lr=3e-4"],
        ["optimizer.lr=3e-4"],
        ["optimizer.lr=1", "optimizer.lr=3e-4"],
    ],
)
def test_three_spellings_of_an_override(words: list[str]) -> None:
    """All spellings set the key over what the file says; the last one wins."""
    assert load("optimizer: {lr: 1}", *words).optimizer.lr == 3e-4


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("trainer.save_total_limit=null", "trainer.save_total_limit", None),
        ("trainer.save_total_limit=", "trainer.save_total_limit", None),
        ("optimizer.betas=[0.9, 0.98]", "optimizer.betas", (0.9, 0.98)),
        ("wandb.tags=[a, b c]", "wandb.tags", ["a", "b c"]),
        ("wandb.tags=[]", "wandb.tags", []),
        ("wandb.name=a: b", "wandb.name", None),  # a mapping, and no text
        ("wandb.name='a: b'", "wandb.name", "a: b"),
        ("wandb.name=x=y", "wandb.name", "x=y"),
        ("trainer.resume_from_checkpoint=true", "trainer.resume_from_checkpoint", True),
        ("trainer.resume_from_checkpoint=latest", "trainer.resume_from_checkpoint", "latest"),
        ("trainer.resume_from_checkpoint=400", "trainer.resume_from_checkpoint", 400),
        ("trainer.mixed_precision=no", "trainer.mixed_precision", "no"),
        ("trainer.mixed_precision=true", "trainer.mixed_precision", "bf16"),
        ("tokenizer.train.vocab_size=512", "tokenizer.train.vocab_size", 512),
        ("tokenizer.train={vocab_size: 256}", "tokenizer.train.vocab_size", 256),
        ("seed=0", "seed", 0),
    ],
)
def test_values_of_overrides(word: str, key: str, value: Any) -> None:
    """Null, lists, mappings, text with special characters and plain words mean what YAML says."""
    if word == "wandb.name=a: b":
        with pytest.raises(UsageError, match="must be text"):
            load("", word)
    else:
        assert value_of(load("", word), key) == value


def test_an_override_replaces_a_null_section() -> None:
    """A key below a section that the file sets to null makes the section."""
    assert load("tokenizer: {train: null}", "tokenizer.train.vocab_size=512").tokenizer.train.vocab_size == 512


# --- YAML ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E4", 1e4), ("1.e3", 1e3), (".5", 0.5), ("-2e+3", -2e3), ("1_000", 1000), ("0x10", 16),
        (".inf", math.inf), ("-.INF", -math.inf), ("no", "no"), ("off", "off"), ("Yes", "Yes"), ("true", True),
        ("FALSE", False), ("e5", "e5"), ("1e", "1e"), ("1.2.3", "1.2.3"), ("~", None), ("null", None), ("", None),
        ("'7'", "7"), ("12", 12), ("[", "["),
        ("2024-13-45", "2024-13-45"), ("bert #2", "bert #2"), ("runs/a #1", "runs/a #1"), ("#2", "#2"), ("5 #", "5 #"),
        ("'bert #2'", "bert #2"), ("c#", "c#"),
    ],
)  # fmt: skip
def test_words_and_numbers_of_yaml(text: str, value: Any) -> None:
    """`1e-4` is a float and `no` a word, as in YAML 1.2; what is no YAML is text, and no part is a comment."""
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize("word", ["no", "off", "false", "NO", "False"])
def test_words_for_false(word: str) -> None:
    """A switch takes the usual words, although YAML 1.2 gives them as text."""
    assert load(f"model: {{rope: {word}}}").model.rope is False


def test_empty_file_is_all_defaults() -> None:
    """An empty config is valid: every key has a default."""
    assert load("") == load("# nothing\n") == load("{}") == RunConfig()


def test_merge_keys_of_yaml() -> None:
    """Anchors and merge keys of YAML work."""
    assert load("variables:\n  a: &a {rope: false}\nmodel:\n  <<: *a\n").model.rope is False


def test_all_problems_are_reported_in_the_order_of_the_file() -> None:
    """One error lists everything, with lines; overrides come last."""
    with pytest.raises(UsageError) as error:
        load("trainer:\n  max_steps: 0\n  save_step: 1\nsead: 1\n", "model.rope=7")
    lines = str(error.value).splitlines()
    assert lines[0] == "cfg.yaml has 4 problems:"
    assert [line.split()[1] for line in lines[1:]] == ["cfg.yaml:2:", "cfg.yaml:3:", "cfg.yaml:4:", "command"]


# --- variables -------------------------------------------------------------------------------------------------------

VARIABLES = 'variables: {width: 128, name: books, deep: {path: "x/${variables.name}"}, off: false, betas: [0.8, 0.9]}\n'


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("model: {hidden_size: $variables.width, num_attention_heads: 4}", "model.hidden_size", 128),
        ('model: {hidden_size: "${variables.width}", num_attention_heads: 4}', "model.hidden_size", 128),
        ("model: {rope: $variables.off}", "model.rope", False),
        ("optimizer: {betas: $variables.betas}", "optimizer.betas", (0.8, 0.9)),
        ('trainer: {output_dir: "runs/${variables.name}-${variables.width}"}', "trainer.output_dir", "runs/books-128"),
        ('trainer: {output_dir: "runs/{$variables.name}"}', "trainer.output_dir", "runs/books"),
        ("dataset: {path: $variables.deep.path}", "dataset.path", "x/books"),
        ("wandb: {tags: [$variables.name, b]}", "wandb.tags", ["books", "b"]),
    ],
)
def test_variables(text: str, key: str, value: Any) -> None:
    """A variable as a whole value keeps its type; inside a text it becomes text; variables may use others."""
    assert value_of(load(VARIABLES + text), key) == value


def test_a_variable_on_the_command_line() -> None:
    """An override can set a variable, and use one."""
    assert load(VARIABLES + "seed: $variables.width", "variables.width=256").seed == 256
    assert load(VARIABLES, "seed=$variables.width").seed == 128


# --- old names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("trainer: {learning_rate: 1e-3}", "optimizer.lr", 1e-3),
        ("trainer: {bf16: false}", "trainer.mixed_precision", "no"),
        ("trainer: {max_ckpt: 5}", "trainer.save_total_limit", 5),
        ("trainer: {dir: x}", "trainer.output_dir", "x"),
        ("optimizer: {hparams: {lr: 2e-4, betas: [0.9, 0.95]}}", "optimizer.betas", (0.9, 0.95)),
        ("dataset: {column: body}", "dataset.text_column", "body"),
        ("tokenizer: {tokenizer_name_or_path: x}", "tokenizer.name", "x"),
        ("model: {xformers_attention: false}", "model.attn_backend", "sdpa"),
        ("mixed_precision: bf16", "trainer.mixed_precision", "bf16"),
    ],
)
def test_old_names(text: str, key: str, value: Any) -> None:
    """An old name sets the present key and says so."""
    loaded = load_text(text, "cfg.yaml")
    assert value_of(loaded.config, key) == value
    assert any("old name" in warning for warning in loaded.warnings)


def test_old_name_on_the_command_line_wins_over_the_file() -> None:
    """An override under an old name replaces the file's value, whichever name that has."""
    assert load("trainer: {learning_rate: 1e-3}", "trainer.learning_rate=2e-3").optimizer.lr == 2e-3
    assert load("optimizer: {lr: 1e-3}", "trainer.learning_rate=2e-3").optimizer.lr == 2e-3
    assert load("trainer: {learning_rate: 1e-3}", "optimizer.lr=2e-3").optimizer.lr == 2e-3


def test_conflict_of_old_and_new_name() -> None:
    """Two names with two values are an error; with one value they are not."""
    with pytest.raises(UsageError, match=r"cfg.yaml:1: trainer.learning_rate is 0.001.*optimizer.lr, which is 0.002"):
        load("trainer: {learning_rate: 1e-3}\noptimizer: {lr: 2e-3}")
    assert load("trainer: {learning_rate: 1e-3}\noptimizer: {lr: 1e-3}").optimizer.lr == 1e-3


def test_saved_config_of_neobert_loads() -> None:
    """A config that NeoBERT wrote into a checkpoint loads, and its values arrive."""
    loaded = load_config(str(GOLDEN / "neobert-config.yaml"))
    config = loaded.config
    assert (config.model.hidden_size, config.trainer.max_steps, config.optimizer.lr) == (64, 20, 1e-3)
    assert config.datacollator.mlm_probability == 0.2
    assert config.tokenizer.path == "tok"
    assert not [warning for warning in loaded.warnings if "old name" in warning]


# --- features that are not built -------------------------------------------------------------------------------------

NOT_BUILT = [(key, default, feature) for feature, keys in not_built.KEYS.items() for key, default in keys.items()]


def test_earlier_config_loads() -> None:
    """A config that has all those keys with their defaults loads without a word, and as the one without them."""
    earlier = load_config(str(GOLDEN / "earlier-config.yaml"))
    assert earlier.warnings == []
    assert differences(earlier.config, load_config("smoke").config) == {}
    written = yaml.safe_load((GOLDEN / "earlier-config.yaml").read_text())
    assert set(not_built.SECTIONS) <= set(written)
    assert set(not_built.SECTIONS).isdisjoint(yaml.safe_load(earlier.config.to_yaml()))


@pytest.mark.parametrize(("key", "default", "feature"), NOT_BUILT, ids=[key for key, *_ in NOT_BUILT])
def test_keys_that_are_not_built(key: str, default: Any, feature: str) -> None:
    """The old default is dropped in silence; any other value is refused, with the feature and the default named."""
    tree: dict[str, Any] = {}
    set_key(tree, key, default)
    assert load_text(yaml.safe_dump(tree), "cfg.yaml") == load_text("", "cfg.yaml")
    with pytest.raises(UsageError) as error:
        load("", f"{key}=other")
    expected = f"{key} is 'other', but {feature} is not built yet; leave it at {default!r}."
    assert str(error.value) == f"command line: {expected}"


@pytest.mark.parametrize(
    ("key", "value", "feature"),
    [(key, value, feature) for key, features in not_built.VALUES.items() for value, feature in features.items()],
)
def test_values_that_are_not_built(key: str, value: str, feature: str) -> None:
    """A value whose feature is not built is refused once, by its feature."""
    with pytest.raises(UsageError) as error:
        load("", f"{key}={value}")
    sentence = f"{key} is {value!r}, but {feature} is not built yet; use another value of `enc config schema`."
    assert str(error.value) == f"command line: {sentence}"


@pytest.mark.parametrize(
    ("text", "key"), [("glue: {task: cola}", "glue.task"), ("mteb: 3", "mteb"), ("contrastive:", "contrastive")]
)
def test_sections_that_are_not_built(text: str, key: str) -> None:
    """In such a section unknown keys are refused too, and so is what is no section."""
    with pytest.raises(UsageError, match=rf"^cfg.yaml:1: {key} is .* is not built yet; leave it out\.$"):
        load(text)


def test_words_for_the_default_of_a_switch() -> None:
    """`no` asks for nothing where the default is false."""
    assert load("dataset: {streaming: no}") == load("")


# --- the schema ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_load(path: Path) -> None:
    """Every recipe is valid, draws no warning, and opens with a line that says what it is for."""
    assert load_config(path.stem).warnings == []
    assert path.read_text().startswith("# ")
    assert load_config(str(path)).config == load_config(path.stem).config


def test_every_field_is_described() -> None:
    """Each key has a help text that ends as a sentence."""
    fields = [(key, info) for key, info in all_fields() if not section_classes(info)]
    assert len(fields) > 150
    assert [key for key, info in fields if not (info.description or "").rstrip().endswith((".", ")"))] == []


def test_configuration_page_is_up_to_date(enc: Enc) -> None:
    """docs/configuration.md is the output of the command that it names."""
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert enc("config", "schema", "--markdown").stdout == page


@pytest.mark.parametrize("name", [path.stem for path in RECIPES.glob("*.yaml")])
def test_yaml_round_trip(name: str) -> None:
    """What `to_yaml` writes loads back to an equal config, without a warning of its own."""
    config = load_config(name).config
    assert load_text(config.to_yaml(), "again.yaml").config == config


def test_differences() -> None:
    """Differences name dotted keys and both values, through optional sections too."""
    old = load("", "optimizer.lr=1e-3")
    new = load("", "optimizer.lr=2e-3", "tokenizer.train.vocab_size=512")
    found = differences(old, new)
    assert found["optimizer.lr"] == (1e-3, 2e-3)
    assert found["tokenizer.train.vocab_size"] == (None, 512)
    assert all(key.startswith(("optimizer.lr", "tokenizer.train")) for key in found)
    assert differences(old, load(old.to_yaml())) == {}


@pytest.mark.parametrize(
    ("key", "keeps"),
    [
        ("trainer.save_steps", True), ("launch.nproc_per_node", True), ("wandb.name", True),
        ("dataset.num_workers", True),
        ("trainer.per_device_train_batch_size", True), ("trainer.global_batch_size", False), ("seed", False),
        ("optimizer.lr", False), ("model.dropout_prob", False), ("dataset.max_seq_length", False),
        ("trainer.mixed_precision", False), ("datacollator.mlm_probability", False), ("trainer.max_steps", False),
    ],
)  # fmt: skip
def test_keeps_numbers(key: str, keeps: bool) -> None:
    """Keys of place and display may change on resume; those that numbers depend on may not."""
    assert key in dict(all_fields())
    assert keeps_numbers(key) is keeps


KEEP_NUMBERS = """debug wandb parallel launch
    dataset.path dataset.pre_tokenize_output dataset.num_proc dataset.num_workers dataset.pin_memory
    dataset.persistent_workers dataset.prefetch_factor dataset.cache_dir
    trainer.output_dir trainer.use_cpu trainer.overwrite_output_dir trainer.resume_from_checkpoint trainer.disable_tqdm
    trainer.max_nonfinite_steps trainer.per_device_train_batch_size trainer.gradient_accumulation_steps
    trainer.per_device_eval_batch_size trainer.logging_steps trainer.log_train_accuracy trainer.log_weight_norms
    trainer.eval_strategy trainer.eval_steps trainer.eval_on_start trainer.eval_max_batches trainer.save_strategy
    trainer.save_steps trainer.save_total_limit trainer.min_free_disk_gb trainer.metric_for_best_model
    trainer.greater_is_better trainer.tensorboard_dir"""


def test_keys_that_keep_numbers() -> None:
    """These keys and sections keep the numbers, with all that is below them, and no other key does."""
    named = KEEP_NUMBERS.split()
    assert {key for key, _ in all_fields() if keeps_numbers(key)} == {
        key for key, _ in all_fields() if key in named or key.partition(".")[0] in named
    }
    assert keeps_numbers("launch.env.ANYTHING")
    assert not keeps_numbers("launcher")


NOT_READ_BY_NAME = {
    "task": "it has one value",
    "launch.restarts.crash": "read by the cause of an end",
    "launch.restarts.lost_rank": "read by the cause of an end",
    "launch.restarts.hang": "read by the cause of an end",
}


def test_every_field_is_read() -> None:
    """Each key is read somewhere, as `section.key` or by a usual name of the section, or says that it has no effect."""
    aliases = {"config", "settings", "collator"}
    owners = attributes_read()
    idle = [
        key
        for key, info in all_fields()
        if not section_classes(info) and not mark_of(info, NoEffect) and key not in NOT_READ_BY_NAME
        if not owners.get(key.rpartition(".")[2], set()) & {*aliases, *key.split(".")[-2:-1]}
    ]
    assert idle == []


def attributes_read() -> dict[str, set[str]]:
    """Return what attributes the package reads, without calls of methods: attribute -> names of what has it."""
    owners: dict[str, set[str]] = {}
    for path in (path for room in ("encoder", "launcher", "tools") for path in (ROOT / room).rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        methods = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
        for node in nodes:
            if isinstance(node, ast.Attribute) and id(node) not in methods:
                owner = getattr(node.value, "id", getattr(node.value, "attr", ""))
                owners.setdefault(node.attr, set()).add(owner)
    return owners


# --- any key ---------------------------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Zs")), max_size=12)


def values(info: FieldInfo) -> st.SearchStrategy:
    """Draw values that a field's type and limits allow."""
    kinds = [kind for kind in (get_args(info.annotation) or (info.annotation,)) if kind is not type(None)]
    limits = {type(mark): mark for mark in _marks(info)}
    low = getattr(limits.get(annotated_types.Ge), "ge", getattr(limits.get(annotated_types.Gt), "gt", None))
    high = getattr(limits.get(annotated_types.Le), "le", getattr(limits.get(annotated_types.Lt), "lt", None))
    if get_origin(info.annotation) is Literal:
        return st.sampled_from(get_args(info.annotation))
    if get_origin(info.annotation) is tuple:
        return st.lists(st.floats(0, 0.99), min_size=2, max_size=2)
    if bool in kinds:
        return st.booleans()
    if int in kinds:
        start = 1 if low is None else int(low) + 1
        return st.integers(start, start + 100 if high is None else int(high))
    if float in kinds:
        ends = {"exclude_min": low is not None, "exclude_max": high is not None}
        return st.floats(low, high, allow_nan=False, allow_infinity=False, **ends)
    if str in kinds:
        return TEXTS
    return st.just(info.get_default(call_default_factory=True))


def _marks(info: FieldInfo) -> list[Any]:
    inner = [mark for kind in get_args(info.annotation) for mark in getattr(kind, "__metadata__", ())]
    nested = [part for mark in inner for part in getattr(mark, "metadata", [mark])]
    return [*info.metadata, *nested]


SETTABLE = [(key, info) for key, info in all_fields() if not section_classes(info)]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(SETTABLE).flatmap(lambda field: st.tuples(st.just(field[0]), values(field[1]))))
def test_any_override_round_trips(pair: tuple[str, Any]) -> None:
    """One key, set to any value that the config takes, is the same after it was written and read again."""
    key, value = pair
    try:
        config = load_text("", "cfg.yaml", {key: value}).config
    except UsageError:  # a rule that spans fields, such as heads that do not divide
        reject()
    again = load_text(config.to_yaml(), "again.yaml").config
    assert again == config
    assert flatten(again.model_dump(mode="json")).keys() == flatten(config.model_dump(mode="json")).keys()


def test_the_metrics_that_choose_a_checkpoint_are_those_of_the_tasks() -> None:
    """The names that the config allows are those that an evaluation gives."""
    allowed = get_args(TrainerConfig.model_fields["metric_for_best_model"].annotation)[0]
    assert set(get_args(allowed)) == {name for task in TASKS.values() for name in task.eval_metrics}
    assert set(get_args(RunConfig.model_fields["task"].annotation)) == TASKS.keys()
