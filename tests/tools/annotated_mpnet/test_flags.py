"""`enc config from-mpnet`: a command line of annotated-mpnet becomes the config that means the same."""

import math
import re
from typing import Any

import pytest
import yaml
from places import ROOT
from running import Enc

from enc.encoder.config.load import load_config, load_text
from enc.encoder.config.schema import RunConfig
from enc.encoder.errors import UsageError
from enc.tools.annotated_mpnet.flags import ALWAYS, FLAGS, config_yaml, flags_table, notes, read

FILES = "--train-dir text --valid-file valid.txt --test-file test.txt"

# Every flag of annotated-mpnet's configuration reference: its spellings, a value that is not its default, and what the
# value becomes. Underlined spellings of two flags are in its parser only. The words at the end go with it.
ROUND_TRIPS: list[tuple[str, str, dict[str, Any], str]] = [
    ("--encoder-layers", "6", {"model.num_hidden_layers": 6}, ""),
    ("--encoder-embed-dim", "384", {"model.hidden_size": 384}, ""),
    ("--encoder-ffn-dim", "1024", {"model.intermediate_size": 1024}, ""),
    ("--encoder-attention-heads", "8", {"model.num_attention_heads": 8}, ""),
    ("--dropout", "0.2", {"model.dropout_prob": 0.2}, ""),
    ("--attention-dropout", "0", {"model.attention_dropout_prob": 0.0}, ""),
    ("--activation-dropout", "0.05", {"model.activation_dropout_prob": 0.05}, ""),
    ("--normalize-before -prenorm", "", {"model.normalize_before": True}, ""),
    ("--activation-fn -activation", "relu2", {"model.hidden_act": "relu2"}, ""),
    ("--max-tokens", "256", {"dataset.max_seq_length": 256, "model.max_position_embeddings": 256}, ""),
    ("--max-positions", "2048", {"dataset.max_seq_length": 512, "model.max_position_embeddings": 2048}, ""),
    ("--relative-attention-num-buckets -num_buckets", "64", {"model.relative_attention_num_buckets": 64}, ""),
    ("--relative-attention-max-distance", "256", {"model.relative_attention_max_distance": 256}, ""),
    ("--tokenizer-name", "some/tokenizer", {"tokenizer.name": "some/tokenizer"}, ""),
    ("--dataset-name", "gair-prox/DCLM-pro", {"dataset.name": "gair-prox/DCLM-pro"}, ""),
    ("--text-field", "body", {"dataset.text_column": "body"}, ""),
    ("--buffer-size", "50000", {}, ""),
    ("--eval-samples", "7", {"dataset.eval_samples": 7, "dataset.test_samples": 7}, ""),
    ("--min-text-length", "200", {"dataset.min_text_length": 200}, ""),
    ("--train-dir", "text", {"dataset.path": "text"}, "--valid-file valid.txt --test-file test.txt"),
    ("--valid-file", "v.txt", {"dataset.validation_file": "v.txt"}, "--train-dir text --test-file test.txt"),
    ("--test-file", "t.txt", {"dataset.test_file": "t.txt"}, "--train-dir text --valid-file valid.txt"),
    ("--total-updates", "77", {"trainer.max_steps": 77}, ""),
    ("--batch-size", "3", {"trainer.per_device_train_batch_size": 3}, ""),
    ("--update-freq -gc_steps", "5", {"trainer.gradient_accumulation_steps": 5}, ""),
    ("--gradient-checkpointing", "", {"trainer.gradient_checkpointing": True}, ""),
    ("--compile", "", {"trainer.torch_compile": True}, ""),
    ("--seed", "3", {"seed": 3}, ""),
    ("--num-workers", "4", {"dataset.num_workers": 4}, ""),
    ("--lr", "1e-3", {"optimizer.lr": 1e-3}, ""),
    ("--warmup-updates -warmup_steps", "50", {"scheduler.warmup_steps": 50, "scheduler.warmup_percent": None}, ""),
    ("--end-learning-rate -end_lr", "6e-5", {"scheduler.final_lr_ratio": 0.1}, ""),
    ("--power", "2", {"scheduler.power": 2.0}, ""),
    ("--beta1", "0.8", {"optimizer.betas": (0.8, 0.98)}, ""),
    ("--beta2", "0.999", {"optimizer.betas": (0.9, 0.999)}, ""),
    ("--weight-decay -wd", "0.1", {"optimizer.weight_decay": 0.1}, ""),
    ("--adam-eps", "1e-8", {"optimizer.eps": 1e-8}, ""),
    ("--clip-grad-norm -grad_clip", "0", {"trainer.gradient_clipping": 0.0}, ""),
    ("--checkpoint-dir", "runs/a", {"trainer.output_dir": "runs/a"}, ""),
    (
        "--checkpoint-interval --save-steps --save_steps", "40",
        {"trainer.save_strategy": "steps", "trainer.save_steps": 40, "trainer.eval_steps": 40}, "",
    ),
    ("--keep-checkpoints", "2", {"trainer.save_total_limit": 2}, "--save-steps 40"),
    ("--save-optimizer-state", "", {}, ""),
    ("--resume", "", {"trainer.resume_from_checkpoint": "latest"}, ""),
    ("--resume-checkpoint", "old/checkpoints/40", {"trainer.resume_from_checkpoint": "old/checkpoints/40"}, "--resume"),
    ("--trust-checkpoint", "", {}, ""),
    ("--hf-model-path", "models/mpnet", {"model.init_from": "models/mpnet"}, ""),
    ("--eval-interval-steps", "9", {"trainer.eval_steps": 9}, "--checkpoint-interval 40"),
    ("--tensorboard-log-dir -log_dir", "logs/tb", {"trainer.tensorboard_dir": "logs/tb"}, ""),
    ("--logging-steps --logging_steps", "10", {"trainer.logging_steps": 10}, ""),
    ("--debug", "", {}, ""),
    ("--wandb", "", {"wandb.enabled": True}, ""),
    ("--wandb-project", "mine", {"wandb.project": "mine"}, ""),
    ("--wandb-name", "1e-4", {"wandb.name": "1e-4"}, ""),
    ("--wandb-id", "0123", {"wandb.id": "0123"}, ""),
    ("--wandb-watch", "", {}, ""),
]  # fmt: skip
SPELLINGS = [(spelling, value, keys, more) for names, value, keys, more in ROUND_TRIPS for spelling in names.split()]

DEFAULTS = {
    "seed": 12345, "objective": "mpnet",
    "model.type": "mpnet", "model.num_hidden_layers": 12, "model.hidden_size": 768, "model.intermediate_size": 3072,
    "model.num_attention_heads": 12, "model.dropout_prob": 0.1, "model.attention_dropout_prob": 0.1,
    "model.activation_dropout_prob": 0.1, "model.normalize_before": False, "model.hidden_act": "gelu",
    "model.max_position_embeddings": 512, "model.relative_attention_num_buckets": None,
    "model.relative_attention_max_distance": None, "model.init_from": None,
    "dataset.name": "HuggingFaceFW/fineweb-edu", "dataset.path": "", "dataset.text_column": "text",
    "dataset.eval_samples": 500, "dataset.test_samples": 500, "dataset.min_text_length": 64,
    "dataset.max_seq_length": 512, "dataset.num_workers": 0, "tokenizer.name": "microsoft/mpnet-base",
    "datacollator.whole_word": True, "datacollator.pack_sequences": True, "datacollator.mlm_probability": 0.15,
    "trainer.max_steps": 10000, "trainer.per_device_train_batch_size": 16, "trainer.gradient_accumulation_steps": 8,
    "trainer.gradient_checkpointing": False, "trainer.torch_compile": False, "trainer.gradient_clipping": 1.0,
    "optimizer.name": "adamw", "optimizer.lr": 6e-4, "optimizer.betas": (0.9, 0.98), "optimizer.weight_decay": 0.01,
    "optimizer.eps": 1e-6, "optimizer.decay_embeddings": True,
    "scheduler.name": "polynomial_decay", "scheduler.warmup_percent": 10, "scheduler.final_lr_ratio": 0.0,
    "scheduler.power": 1.0,
    "trainer.output_dir": "./checkpoints", "trainer.save_strategy": "best", "trainer.save_total_limit": 1,
    "trainer.metric_for_best_model": "eval_loss", "trainer.resume_from_checkpoint": None, "trainer.eval_steps": 5000,
    "trainer.tensorboard_dir": None, "trainer.logging_steps": 25, "trainer.mixed_precision": "bf16",
    "wandb.enabled": False, "wandb.project": "annotated-mpnet", "wandb.name": None, "wandb.id": None,
}  # fmt: skip


def config_of(words: str) -> RunConfig:
    """Return the config of a command line, as its text loads, and see that nothing in it draws a warning."""
    loaded = load_text(config_yaml(read(words.split())), "printed.yaml")
    assert loaded.warnings == []
    return loaded.config


def notes_of(words: str) -> str:
    return "\n".join(notes(read(words.split())))


def at(config: RunConfig, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


# --- flags and keys --------------------------------------------------------------------------------------------------


def test_defaults() -> None:
    """An empty command line is the defaults of annotated-mpnet's reference."""
    config = config_of("")
    assert {key: at(config, key) for key in DEFAULTS} == DEFAULTS


def test_every_flag_is_known() -> None:
    """The table of the program has the flags of the reference, with their spellings, and no others."""
    assert [flag.names for flag in FLAGS] == [names for names, *_ in ROUND_TRIPS]


@pytest.mark.parametrize(("spelling", "value", "keys", "more"), SPELLINGS, ids=[case[0] for case in SPELLINGS])
def test_every_flag_becomes_its_keys(spelling: str, value: str, keys: dict[str, Any], more: str) -> None:
    """A value other than the default arrives under its key, or the user is told why it has none."""
    words = f"{more} {spelling} {value}"
    config = config_of(words)
    assert {key: at(config, key) for key in keys} == keys
    assert all(DEFAULTS.get(key) != expected for key, expected in keys.items() if key != "dataset.max_seq_length")
    assert keys or f"{spelling} has no key: " in notes_of(words)


def test_flags_without_a_key_change_nothing() -> None:
    """Such a flag leaves the config as it is."""
    words = [f"{names} {value}" for names, value, keys, _ in ROUND_TRIPS if not keys]
    assert len(words) == 5
    assert config_of(" ".join(words)) == config_of("")


def test_spellings_that_argparse_allows() -> None:
    """Abbreviations, `=`, negative numbers and the last of several, as annotated-mpnet reads them."""
    words = "--encoder-lay 4 --encoder-layers=6 --norm --keep-checkpoints -1 -wd 0.2 --checkpoint-int -1"
    config = config_of(words)
    assert (config.model.num_hidden_layers, config.optimizer.weight_decay) == (6, 0.2)
    assert at(config, "model.normalize_before") is True
    assert config_of("--dataset-name=") == config_of("")


@pytest.mark.parametrize(
    ("words", "keys", "note"),
    [
        ("--checkpoint-interval 0", {"save_strategy": "best", "eval_steps": 5000}, ""),
        ("--eval-interval-steps 0 --total-updates 300", {"eval_steps": 300}, ""),
        ("--checkpoint-interval 40 --keep-checkpoints 3", {"save_strategy": "steps", "save_total_limit": 3}, ""),
        (
            "--checkpoint-interval 40 --keep-checkpoints 0",
            {"save_strategy": "best", "save_total_limit": 1, "eval_steps": 40},
            "--keep-checkpoints 0 deletes",
        ),
        ("--eval-samples 0", {"save_strategy": "no", "metric_for_best_model": None}, "nothing is evaluated"),
        ("--eval-samples 0 --save-steps 40", {"save_strategy": "steps", "metric_for_best_model": None}, "no best"),
        ("--resume", {"resume_from_checkpoint": "latest"}, "enc ckpt import FILE --out RUN"),
    ],
)
def test_saving_and_evaluating(words: str, keys: dict[str, Any], note: str) -> None:
    """Intervals, the best checkpoint and what is kept follow annotated-mpnet's rules."""
    trainer = config_of(words).trainer
    assert {key: getattr(trainer, key) for key in keys} == keys
    assert note in notes_of(words)


def test_files_take_the_place_of_a_dataset() -> None:
    """With files nothing is held out, and what concerns a stream has no effect, as in annotated-mpnet."""
    words = f"{FILES} --min-text-length 3 --eval-samples 9"
    dataset = config_of(words).dataset
    assert (dataset.path, dataset.validation_file, dataset.test_file) == ("text", "valid.txt", "test.txt")
    assert (dataset.eval_samples, dataset.test_samples, dataset.min_text_length) == (None, None, 1)
    assert "--min-text-length has no effect with --train-dir" in notes_of(words)
    assert "--eval-samples has no effect with --train-dir" in notes_of(words)


@pytest.mark.parametrize(
    ("words", "note"),
    [
        ("--max-positions 2048", "positions for 2048 to grow into"),
        ("--num-workers 2", "exact here with any --num-workers"),
        ("--dataset-name a/b", "a/b is downloaded and tokenised before training"),
        ("--save-optimizer-state", "in every checkpoint"),
        ("--wandb-watch", "norms of gradients and weights"),
    ],
)
def test_notes(words: str, note: str) -> None:
    """What works differently is told."""
    assert note in notes_of(words)


def test_zero_becomes_the_shortest_length() -> None:
    """No filter is a shortest text of one character."""
    assert config_of("--min-text-length 0").dataset.min_text_length == 1


def test_only_decided_keys_are_printed() -> None:
    """Nothing but keys that a flag decides, in the order of the schema."""
    tree = yaml.safe_load(config_yaml(read([])))
    assert list(tree) == [name for name in RunConfig.model_fields if name in tree]
    decided = {key for flag in FLAGS for key in flag.keys.split()} | {*ALWAYS}
    decided |= {"scheduler.warmup_percent", "trainer.metric_for_best_model"}
    printed = {f"{section}.{key}" for section, keys in tree.items() if isinstance(keys, dict) for key in keys}
    assert printed <= decided


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (f"--dataset-name a/b {FILES}", "--dataset-name and --train-dir exclude each other"),
        ("--train-dir text", "--train-dir needs --valid-file and --test-file too"),
        ("--train-dir text --test-file t.txt", "--train-dir needs --valid-file too"),
        ("--valid-file v.txt", "--valid-file needs --train-dir and --test-file too"),
        ("--hf-model-path m --resume", "--hf-model-path and --resume exclude each other"),
        ("--hf-model-path m --resume-checkpoint c", "--hf-model-path and --resume-checkpoint exclude each other"),
        ("--resume-checkpoint c", "--resume-checkpoint needs --resume"),
        ("--encoder-embed-dim 100", "is 100, which --encoder-attention-heads 12 does not divide"),
        ("--max-positions 256", "--max-positions is 256, but rows have the 512 tokens of --max-tokens"),
        ("--relative-attention-max-distance 8", "is 8, must be above 8, a quarter of the 32 buckets"),
        ("--eval-samples -1", "--eval-samples is -1, must be at least 0"),
        ("--logging-steps 0", "--logging-steps is 0, must be at least 1"),
        ("--update-freq 0", "--update-freq is 0, must be at least 1"),
        ("--batch-size 0", "--batch-size is 0, must be at least 1"),
        ("--total-updates 0", "--total-updates is 0, must be at least 1"),
        ("--warmup-updates 11 --total-updates 10", "--warmup-updates is 11, more than the 10 of --total-updates"),
        ("--end-learning-rate 1 --lr 0.1", "--end-learning-rate is 1, more than the 0.1 of --lr"),
        ("--lr 0 --end-learning-rate 1", "--lr is 0, must be above 0"),
        ("--encoder-attention-heads 0", "--encoder-attention-heads is 0, must be at least 1"),
        ("--activation-fn swish", "allowed: gelu, gelu_accurate, relu, relu2, silu, tanh, linear"),
        ("--keep-checkpoints -2", "--keep-checkpoints is -2, must be at least -1"),
        ("--dropout 1", "--dropout is 1, must be at least 0 and below 1"),
        ("--adam-eps nan", "--adam-eps is nan, must be a finite number"),
        ("--lr fast", "--lr is 'fast', must be a number"),
        ("--seed 1.5", "--seed is '1.5', must be a whole number"),
        ("--checkpoint-dir=", "--checkpoint-dir is empty"),
        ("--wandb-name=a\tb", "--wandb-name is 'a\\tb', must be one line of printable characters"),
        ("--encodr-layers 3", "--encodr-layers is no flag of pretrain-mpnet; did you mean --encoder-layers?"),
        ("pretrain-mpnet --seed 3", "'pretrain-mpnet' belongs to no flag; leave it out"),
        ("--max 3", "ambiguous option: --max could match --max-tokens, --max-positions"),
        ("--lr", "argument --lr: expected one argument"),
        ("--resume=yes", "argument --resume: ignored explicit argument 'yes'"),
    ],
)
def test_refused(words: str, says: str) -> None:
    """A problem is a sentence with the flag, its value and what would be right."""
    with pytest.raises(UsageError) as error:
        read(words.split(" "))
    assert says in str(error.value)


def test_all_problems_are_told_together(enc: Enc) -> None:
    """Exit code 2, nothing on stdout, and each problem in a line."""
    words = "--encoder-layers x --dropout 2 --nonsense 3 --resume-checkpoint c --encoder-embed-dim 100 --train-dir t"
    done = enc("config", "from-mpnet", "--", *words.split(), code=2)
    assert done.stdout == ""
    assert "has 6 problems" in done.stderr
    assert done.stderr.count("\n- --") == 6


# --- the command, the page, the recipe -------------------------------------------------------------------------------


def test_what_is_printed_is_a_config(enc: Enc) -> None:
    """YAML on stdout that `enc config check` takes without a note; prose on stderr; `--` may be left out."""
    done = enc("config", "from-mpnet", "--", "--encoder-layers", "2", "-wd", "0.1", "--debug")
    assert enc("config", "from-mpnet", "--encoder-layers", "2", "-wd", "0.1", "--debug").stdout == done.stdout
    assert "Note: --debug has no key: use `enc --debug`." in done.stderr
    (enc.folder / "mpnet.yaml").write_text(done.stdout)
    checked = enc("config", "check", "mpnet.yaml")
    assert checked.stdout == "mpnet.yaml: no problems.\n"
    assert all(note.startswith("hub: ") for note in checked.stderr.split("Note: ")[1:])  # there is none here


def test_the_table_of_the_page_is_the_one_of_the_program() -> None:
    """docs/mpnet.md holds the output of `flags_table`."""
    assert flags_table() in (ROOT / "docs" / "mpnet.md").read_text(encoding="utf-8")


def test_recipe_is_the_empty_command_line() -> None:
    """The recipe and what an empty command line prints differ in place and sample only."""
    places = ("dataset.config", "dataset.num_proc", "dataset.num_workers", "trainer.output_dir", "wandb.project")
    printed = config_of("")
    recipe = load_config("mpnet-base").config
    assert recipe.changed({key: at(printed, key) for key in places}) == printed


def test_recipe_trains(enc: Enc) -> None:
    """Four steps of the recipe, made small, on the built-in corpus: it learns, and its last step is saved."""
    small = (
        "dataset.name=python-docs dataset.config=null dataset.max_seq_length=64 dataset.eval_samples=20 "
        "dataset.test_samples=20 dataset.num_workers=0 tokenizer.train={vocab_size: 1024, max_documents: 500} "
        "model.hidden_size=32 model.intermediate_size=64 model.num_hidden_layers=2 model.num_attention_heads=4 "
        "trainer.max_steps=4 trainer.per_device_train_batch_size=4 trainer.gradient_accumulation_steps=2 "
        "trainer.mixed_precision=no trainer.logging_steps=1 trainer.output_dir=run optimizer.lr=1e-2"
    )
    enc("launch", "pretrain", "mpnet-base", *re.split(r" (?=\w+\.)", small))
    losses = [record["loss"] for record in enc.records("run").values()]
    assert losses[0] == pytest.approx(math.log(1024), abs=0.3)
    assert losses[-1] < losses[0] - 0.1
    assert (enc.folder / "run" / "checkpoints" / "4" / "manifest.json").is_file()
