"""What a user gets wrong ends in a message that says what, where and what to do; nothing is lost or half-written.

One table drives the real command line. A row names its bad input, how to set it up, the command, its exit code and what
the message must contain. After each command the working folder is compared with what it was before, file by file.
"""

import hashlib
import json
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from foreign import hostile_pickle, hostile_torch_file
from running import Enc
from safetensors.torch import save_file
from shared import made_once

from enc.encoder.checkpoints.folder import write_manifest

MAX_LINES = 12


@dataclass(frozen=True)
class World:
    """The working folder of a row, and the finished things that it may copy and damage."""

    folder: Path
    finished: Callable[[str], Path]  # name of a session fixture -> its folder, made when first asked for

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def run(self) -> Path:
        """Copy the finished run, of 6 steps with checkpoints 3 and 6, to `run`."""
        return shutil.copytree(self.finished("finished_run"), self.folder / "run")

    def store(self) -> Path:
        """Copy the token store of `smoke` to `store`."""
        return shutil.copytree(self.finished("store"), self.folder / "store")


Setup = Callable[[World], object]


@dataclass(frozen=True)
class Row:
    """One bad input. `STORE` in the command stands for the ready store, `SMOKE` for a launch of the `smoke` recipe."""

    id: str
    command: str
    says: tuple[str, ...]
    code: int = 2
    setup: Setup = lambda world: None
    writes: tuple[str, ...] = ()  # folders and files that this command may change
    out: tuple[str, ...] = ()  # what stdout must contain


def yaml(text: str) -> Setup:
    return lambda world: world.write("cfg.yaml", text)


def config(id: str, text: str, *says: str) -> Row:
    """A config file that `enc launch` refuses before it touches anything."""
    return Row(f"config: {id}", "launch pretrain cfg.yaml", says, setup=yaml(text))


def override(id: str, words: str, *says: str) -> Row:
    """Words after a good config that `enc launch` refuses."""
    return Row(f"override: {id}", f"SMOKE {words}", says)


def source(id: str, name: str, content: str | bytes | None, words: str, *says: str) -> Row:
    """A text source that `enc launch` cannot tokenise; no content makes an empty folder."""

    def setup(world: World) -> None:
        if content is None:
            (world.folder / name).mkdir()
        else:
            world.write(name, content)

    command = f"launch pretrain smoke dataset.path={name} dataset.pre_tokenize_output=new/store {words}"
    return Row(f"source: {id}", f"{command} trainer.output_dir=new/run", says, setup=setup)


def deepspeed(id: str, content: str, *says: str, words: str = "") -> Row:
    """A DeepSpeed JSON of the user's that `enc launch` refuses before it touches anything."""
    command = f"SMOKE parallel.engine=deepspeed parallel.deepspeed_config=ds.json {words}"
    return Row(f"deepspeed json: {id}", command, says, setup=lambda world: world.write("ds.json", content))


def flip(path: Path, position: float = 0.5, bit: int = 0) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[int(len(data) * position)] ^= 1 << bit
    path.write_bytes(data)


def cut(path: Path) -> None:
    """Drop the second half of a file."""
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def cut_end(folder: Path) -> None:
    """Drop the last bytes of w.safetensors."""
    path = folder / "w.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def with_config(world: "World", name: str, text: str) -> None:
    """Make a folder of weights with a config, of which `text` begins with the value of `day`."""
    world.write(f"{name}/config.yaml", f"day: {text}")
    save_file({"w": torch.ones(2)}, world.folder / name / "model.safetensors")


def without_state(checkpoint: Path) -> None:
    """Remove the counters of a checkpoint and make it look as if there had never been any."""
    (checkpoint / "trainer_state.json").unlink()
    write_manifest(checkpoint, 6)


def in_run(damage: Callable[[Path], object]) -> Setup:
    return lambda world: damage(world.run())


def in_store(damage: Callable[[Path], object]) -> Setup:
    return lambda world: damage(world.store())


def only_checkpoint(damage: Callable[[Path], object]) -> Setup:
    def setup(world: World) -> None:
        run = world.run()
        shutil.rmtree(run / "checkpoints" / "3")
        damage(run / "checkpoints" / "6")

    return setup


def _no_mask(world: World) -> None:
    tokenizer = json.loads((world.finished("store") / "tokenizer" / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["content"] != "[MASK]"]
    vocab = tokenizer["model"]["vocab"]
    vocab["other"] = vocab.pop("[MASK]")
    world.write("nomask/tokenizer.json", json.dumps(tokenizer))


def _hostile(world: World) -> None:
    hostile_torch_file(world.folder / "w.pt", world.folder / "it-ran")
    world.write("dcp/__0_0.distcp", "")
    hostile_pickle(world.folder / "dcp" / ".metadata", world.folder / "it-ran")


def _run_and_other(world: World) -> None:
    world.run()
    save_file({"other": torch.ones(2)}, world.folder / "w.safetensors")


WEIGHTS, SHARD = "model.safetensors", "state/moments-00000-of-00001.safetensors"
TRAIN_DATA = "train/data-00000.arrow"
ON_STORE = "launch pretrain smoke dataset.pre_tokenize_output=store trainer.output_dir=new/run"
TEXT = "".join(f"Line {n} of a small text about the number {n * n}.\n" for n in range(200))

ROWS = [
    # ---- the config file -----------------------------------------------------------------------------------------
    config("unknown key", "model:\n  depth: 3\n", "cfg.yaml:2", "model.depth is not a key"),
    config("mistyped key", "model:\n  hiden_size: 64\n", "cfg.yaml:2", "model.hiden_size", "mean model.hidden_size?"),
    config("mistyped section", "trainr:\n  max_steps: 3\n", "cfg.yaml:1", "trainr is not a", "did you mean trainer?"),
    config("key in the wrong section", "model:\n  lr: 1e-3\n", "cfg.yaml:2", "model.lr", "did you mean optimizer.lr?"),
    config("key of another model", "model:\n  type: mpnet\n  rope: true\n", "cfg.yaml:3", "no key of model.type mpnet"),
    config("MPNet's key in a NeoBERT", "model: {normalize_before: true}\n", "no key of model.type neobert"),
    config("unknown model", "model: {type: bert}\n", "model.type is 'bert', allowed: 'neobert' or 'mpnet'"),
    config("objective of another model", "objective: mpnet\n", "cfg.yaml:1", "only an MPNet has", "model.type mpnet"),
    config(
        "too few buckets", "model: {type: mpnet, relative_attention_num_buckets: 2}\n", "greater than or equal to 4"
    ),
    config(
        "distance inside the buckets",
        "model: {type: mpnet, relative_attention_max_distance: 8}\n",
        "max_distance is 8",
        "more than 8",
    ),
    config("activation", "model: {type: mpnet, hidden_act: swiglu}\n", "'swiglu', allowed: 'gelu', 'gelu_accurate'"),
    config("replaced too often", "datacollator: {mask_replace_prob: 0.95}\n", "random_replace_prob is 0.1", "than 1"),
    config("duplicate key", "seed: 1\nmodel: {rope: true}\nseed: 2\n", "cfg.yaml:3: seed is given twice", "cfg.yaml:1"),
    config("text for a whole number", "trainer:\n  max_steps: many\n", "cfg.yaml:2", "'many', must be a whole number"),
    config("fraction for a whole number", "trainer: {max_steps: 10.5}\n", "cfg.yaml:1", "10.5, must be a whole number"),
    config("float for a whole number", "trainer: {max_steps: 1e3}\n", "max_steps is 1000.0", "write 1000"),
    config("text for a number", "optimizer:\n  lr: fast\n", "cfg.yaml:2", "optimizer.lr is 'fast', must be a number"),
    config("list for a section", "model: [1, 2]\n", "cfg.yaml:1", "model is [1, 2]", "section of key: value lines"),
    config("text for true or false", "model: {rope: perhaps}\n", "model.rope is 'perhaps', must be true or false"),
    config("number for text", "trainer: {output_dir: 7}\n", "trainer.output_dir is 7, must be text", "quotes"),
    config(
        "several at once",
        "seed: x\nmodel:\n  hiden_size: 1\n  rope: 7\ntrainer:\n  max_steps: 0\n  mixed_precision: fp16\n",
        "5 problems",
        "cfg.yaml:1: seed",
        "cfg.yaml:3: model.hiden_size",
        "cfg.yaml:4: model.rope",
        "cfg.yaml:6: trainer.max_steps is 0",
        "cfg.yaml:7: trainer.mixed_precision",
        "fp16 is not supported",
    ),
    config("bad YAML", "model:\n  a: [1, 2\ntrainer: 3\n", "cfg.yaml, line 3", "not valid YAML"),
    config("tab in YAML", "model:\n\trope: true\n", "cfg.yaml, line 2", "not valid YAML"),
    config("two YAML documents", "seed: 1\n---\nseed: 2\n", "cfg.yaml", "not valid YAML", "another document"),
    config("unhashable key", "[1, 2]: 3\n", "cfg.yaml:1"),
    config("list as key of a section", "model:\n  ? [a]\n  : 3\n", "cfg.yaml:2"),
    config("number as key", "model: {3: 4}\n", "cfg.yaml:1", "3 is not a key"),
    config("object tag", "model: !!python/object:os.system {}\n", "cfg.yaml", "python/object"),
    config("endless list", "seed: &a [*a]\n", "cfg.yaml:1", "the anchor is used inside of itself"),
    config("endless mapping", "seed: 1\nmodel: &a {rope: *a}\n", "cfg.yaml:2", "the anchor is used inside of itself"),
    config("dotted key", "seed: 1\ntrainer.max_steps: 3\n", "cfg.yaml:2", "write trainer: and", "max_steps:"),
    config("unknown dotted key", "trainer.steps: 3\n", "cfg.yaml:1: trainer.steps is not a key"),
    config("empty section", "model:\n", "cfg.yaml:1: model is empty (null), must be a section"),
    config("a list, no mapping", "- model\n- trainer\n", "cfg.yaml", "a config is a mapping of sections"),
    config("a word, no mapping", "hello\n", "cfg.yaml", "a config is a mapping of sections"),
    config(
        "undefined variable",
        "variables: {width: 64}\nmodel: {hidden_size: $variables.widht}\n",
        "cfg.yaml:2",
        "variables.widht, which is not defined",
        "did you mean width?",
    ),
    config(
        "cyclic variables",
        "variables: {a: $variables.b, b: $variables.a}\nseed: $variables.a\n",
        "cfg.yaml:2",
        "seed refers to itself: a -> b -> a",
    ),
    config("variables no mapping", "variables: [1]\nseed: $variables.a\n", "cfg.yaml:1", "variables"),
    config(
        "old and new name",
        "trainer:\n  learning_rate: 1e-3\noptimizer:\n  lr: 1e-4\n",
        "cfg.yaml:2",
        "trainer.learning_rate is 0.001",
        "optimizer.lr, which is 0.0001",
        "keep one",
    ),
    config("muonclip", "optimizer:\n  name: muonclip\n", "cfg.yaml:2", "'muonclip', but MuonClip is not built yet"),
    config("streaming", "dataset: {streaming: true}\n", "dataset.streaming is True, but streaming is not built yet"),
    config(
        "contrastive",
        "task: contrastive\ncontrastive: {temperature: 0.1}\n",
        "cfg.yaml:1: task",
        "cfg.yaml:2",
        "contrastive.temperature is 0.1",
        "contrastive training is not built yet",
    ),
    config("heads that do not divide", "model:\n  num_attention_heads: 7\n", "cfg.yaml:2", "does not divide", "768"),
    config("bias of a tied head", "model: {decoder_bias: true}\n", "model.decoder_bias", "tie_word_embeddings false"),
    config("odd head size", "model: {hidden_size: 60, num_attention_heads: 4}\n", "heads of 15", "even"),
    config(
        "row longer than positions", "dataset:\n  max_seq_length: 1024\n", "cfg.yaml:2", "1024", "512 tokens", "raise"
    ),
    config(
        "validation_split 1.5", "dataset: {validation_split: 1.5}\n", "dataset.validation_split is 1.5", "less than 1"
    ),
    config("negative max_steps", "trainer: {max_steps: -3}\n", "trainer.max_steps is -3", "greater than 0"),
    config("NaN", "optimizer: {lr: .nan}\n", "optimizer.lr is nan", "finite"),
    Row(
        "config: not text",
        "launch pretrain cfg.yaml",
        ("cfg.yaml cannot be read as text",),
        setup=lambda world: world.write("cfg.yaml", b"model: \xff\xfe\x00"),
    ),
    Row(
        "config: control character",
        "launch pretrain cfg.yaml",
        ("cfg.yaml", "not valid YAML"),
        setup=lambda world: world.write("cfg.yaml", "model: \x07\n"),
    ),
    Row("config: empty file", "launch pretrain cfg.yaml", ("'bert-base-uncased'", "tokenizer.path"), setup=yaml("")),
    Row("config: missing file", "launch pretrain nowhere/cfg.yaml", ("nowhere/cfg.yaml", "Recipes are", "smoke")),
    Row(
        "config: a folder",
        "launch pretrain folder",
        ("folder", "is a folder"),
        setup=lambda world: (world.folder / "folder").mkdir(),
    ),
    Row("config: recipe typo", "launch pretrain smok", ("'smok'", "did you mean smoke?")),
    Row(
        "config check",
        "config check cfg.yaml",
        ("cfg.yaml:1: sead is not a key; did you mean seed?",),
        setup=yaml("sead: 1"),
    ),
    # ---- the user's own DeepSpeed JSON ---------------------------------------------------------------------------
    deepspeed("bad JSON", '{"zero_optimization": {,}}', "ds.json", "not valid JSON", "line 1 column 24"),
    deepspeed("trailing comma", '{\n "steps_per_print": 1,\n}', "ds.json", "not valid JSON", "line"),
    deepspeed("a list", "[1]", "ds.json: DeepSpeed's settings are an object"),
    deepspeed("empty", "", "ds.json", "not valid JSON"),
    deepspeed("not text", "\0", "ds.json", "not valid JSON"),
    deepspeed("mistyped section", '{\n"zero_optimisation": {"stage": 2}}', "ds.json:2", "mean zero_optimization?"),
    deepspeed(
        "mistyped key", '{"zero_optimization": {\n"overlap_com": true}}', "ds.json:2", "did you mean overlap_comm?"
    ),
    deepspeed("key given twice", '{"steps_per_print": 1,\n"steps_per_print": 2}', "ds.json:2", "given twice"),
    deepspeed("another kind", '{"wall_clock_breakdown": 3}', "ds.json:1", "is 3, must be true or false"),
    deepspeed("another stage", '{"zero_optimization": {"stage": 1}}', "the run has 2; set parallel.zero_stage 1"),
    deepspeed("fp16", '{"fp16": {"enabled": true}}', "ds.json:1: fp16.enabled is true", "mixed_precision bf16"),
    deepspeed("steps_per_print 0", '{"steps_per_print": 0}', "ds.json:1", "must be a whole number of at least 1"),
    deepspeed("no overflow check", '{"bf16": {"check_grad_overflow": false}}', "ds.json:1", "but enc needs true"),
    deepspeed("a key of Comet", '{"comet": {"enabled": true, "api_key": "X"}}', "ds.json:1: comet has no place"),
    deepspeed("another batch", '{"train_batch_size": 7}', "train_batch_size is 7", "set trainer.global_batch_size 7"),
    deepspeed(
        "several at once",
        '{"train_batch_size": 7,\n"fp16": {"enabled": true},\n"zero_optimization": {"stag": 1, "stage": 1}}',
        "ds.json has 4 problems",
        "ds.json:1: train_batch_size",
        "ds.json:2: fp16.enabled",
        "ds.json:3: zero_optimization.stag is not",
        "ds.json:3: zero_optimization.stage",
    ),
    override(
        "no DeepSpeed JSON", "parallel.engine=deepspeed parallel.deepspeed_config=no.json", "no.json cannot be read"
    ),
    override("DeepSpeed JSON without DeepSpeed", "parallel.deepspeed_config=x", "needs parallel.engine deepspeed"),
    override("replicas do not divide", "--nproc 2 parallel.engine=fsdp parallel.replicate=3", "does not divide the 2"),
    override("replicas of one rank", "parallel.engine=fsdp parallel.replicate=3", "does not divide the 1 ranks"),
    Row("render: replicas", "render fsdp smoke --nodes 4 parallel.replicate=3", ("does not divide the 4 ranks",)),
    Row("render: offload", "render fsdp smoke parallel.offload=optimizer", ("needs parallel.engine deepspeed",)),
    Row("render: batch", "render deepspeed smoke --nodes 3 trainer.global_batch_size=4", ("4 rows", "3 ranks")),
    Row(
        "render: below a file",
        "render fsdp smoke --to file/there",
        ("--to file/there: fsdp.json cannot be written there", "Not a directory", "name another folder"),
        setup=lambda world: world.write("file", ""),
    ),
    Row("render: in /proc", "render fsdp smoke --to /proc/there", ("--to /proc/there: fsdp.json cannot be written",)),
    Row("render: long name", f"render fsdp smoke --to {'n' * 300}", ("cannot be written there", "name too long")),
    Row("plan: MFU 0", "plan smoke --mfu 0", ("Invalid value for '--mfu'",)),
    Row("plan: MFU 2", "plan smoke --mfu 2", ("Invalid value for '--mfu'",)),
    Row(
        "plan: number beyond floats",
        f"plan smoke trainer.max_steps=1{'0' * 330}",
        ("smoke: a number of this run is too large to compute with",),
    ),
    Row(
        "engine: auto and its settings",
        "SMOKE --nproc 2 parallel.offload=optimizer parallel.replicate=2 --dry-run",
        ("parallel.replicate is 2, which needs parallel.engine fsdp", "auto took deepspeed"),
    ),
    Row("plan: GPU", "plan smoke --gpu h100", ("--gpu h100 is not known", "did you mean h100-80gb?", "a100-40gb")),
    Row("plan: MFU", "plan smoke --mfu 40", ("Invalid value for '--mfu'",)),
    Row("plan: nodes", "plan smoke --nodes 0", ("Invalid value for '--nodes'",)),
    # ---- words on the command line -------------------------------------------------------------------------------
    override("without value", "--trainer.max_steps", "--trainer.max_steps has no value", "--trainer.max_steps=VALUE"),
    override("swallows the next", "--trainer.max_steps --seed=3", "--trainer.max_steps has no value"),
    override("unknown option", "--nporc 2", "--nporc is neither an option", "did you mean --nproc?"),
    override("unknown key", "trainer.max_step=3", "trainer.max_step is not a key", "did you mean trainer.max_steps?"),
    override("a bare word", "quick", "'quick' is neither an option nor an override"),
    override("into a value", "seed.x=3", "seed"),
    override("a section", "model=3", "command line: model is 3, must be a section"),
    override("empty key", "=3", "=3"),
    override("--nproc 0", "--nproc 0", "launch.nproc_per_node is 0", "greater than 0"),
    override("--nproc two", "--nproc two", "Invalid value for '--nproc'", "integer"),
    override("--nodes 2", "--nodes 2", "How many GPUs a node has is not known", "--gpus-per-node N"),
    override("--nodes 0", "--nodes 0", "launch.nodes is 0", "greater than 0"),
    override("local nodes", "--nodes 2 launch.scheduler=local", "this machine is one", "--nodes 1"),
    override("--time soon", "--time soon", "launch.slurm.time is 'soon'"),
    override("--site moon", "--site moon", "moon", "Sites are"),
    override("--trouble storm", "--rehearse --trouble storm", "no trouble 'storm'", "lost-rank"),
    override(
        "batch that does not divide", "trainer.global_batch_size=10 --nproc 4", "10 rows", "4 ranks", "1, 2, 5, 10"
    ),
    override("no room for checkpoints", "trainer.min_free_disk_gb=1e9", "not even two fit", "free some space"),
    override("run folder below a file", "trainer.output_dir=a.txt/run", "a.txt/run", "Choose another"),
    override("a file as run folder", "trainer.output_dir=a.txt", "a.txt", "Choose another"),
    # ---- the text ------------------------------------------------------------------------------------------------
    source("missing", "other.txt", "x", "dataset.path=nothere/books", "dataset.path: nothere/books does not exist"),
    source("empty file", "text.txt", "", "", "text.txt", "No usable document", "add text"),
    source("white space alone", "text.txt", " \n\n\t\n", "", "No usable document"),
    source("empty folder", "books", None, "", "the folder books holds no text", ".jsonl"),
    source("no such suffix", "text.docx", "x", "", "text.docx", ".txt"),
    source("jsonl without a text column", "a.jsonl", '{"title": "x"}\n', "", "a.jsonl, line 1", "title", "text_column"),
    source(
        "text_column that is not there",
        "a.jsonl",
        '{"text": "x"}\n',
        "dataset.text_column=body",
        "a.jsonl, line 1",
        "no column 'body'",
        "it has text",
    ),
    source("jsonl with a broken line", "a.jsonl", '{"text": "x"}\n{"text": "y"\n', "", "a.jsonl, line 2", "not JSON"),
    source("text column of numbers", "a.jsonl", '{"text": 3}\n', "", "a.jsonl, line 1", "holds int, not text"),
    source("binary file as text", "a.txt", bytes(range(256)) * 40, "", "a.txt is not UTF-8", "offset 128", "Convert"),
    source("binary file as gzip", "a.txt.gz", b"plain", "", "a.txt.gz is damaged"),
    source("binary file as parquet", "a.parquet", b"plain", "", "a.parquet is not a readable Parquet file"),
    source(
        "eval_split of a source without",
        "a.txt",
        TEXT,
        "dataset.eval_split=validation dataset.eval_samples=null",
        "a.txt",
        "'validation'",
        "validation_split",
    ),
    source(
        "target below a file",
        "a.txt",
        TEXT,
        "dataset.pre_tokenize_output=a.txt/store",
        "a.txt/store",
        "pre_tokenize_output",
    ),
    source(
        "tokenizer folder missing",
        "a.txt",
        TEXT,
        "tokenizer.train=null tokenizer.path=nothere",
        "nothere is not a folder",
    ),
    source(
        "tokenizer hub name", "a.txt", TEXT, "tokenizer.train=null", "'bert-base-uncased'", "network", "tokenizer.path"
    ),
    source(
        "empty after min_text_length", "a.txt", TEXT, "dataset.min_text_length=1000", "min_text_length=1000", "Lower"
    ),
    Row(
        "source: hub name while offline",
        "launch pretrain smoke dataset.name=no/such dataset.pre_tokenize_output=new/store trainer.output_dir=new/run",
        ("'no/such'", "network", "dataset.path"),
    ),
    Row(
        "source: tokenizer without mask token",
        "launch pretrain smoke tokenizer.train=null tokenizer.path=nomask "
        "dataset.pre_tokenize_output=new/store trainer.output_dir=new/run",
        ("nomask", "no mask token", "allow_special_token_rewrite"),
        setup=_no_mask,
    ),
    Row("preprocess: missing source", "preprocess smoke dataset.path=nothere", ("nothere does not exist",)),
    source(
        "validation file missing",
        "a.txt",
        TEXT,
        "dataset.eval_samples=null dataset.validation_file=nothere.txt",
        "dataset.validation_file: nothere.txt does not exist",
    ),
    source("test file missing", "a.txt", TEXT, "dataset.test_file=b/*.txt", "dataset.test_file", "matches no file"),
    source(
        "test file trained on",
        "a.txt",
        TEXT,
        "dataset.test_file=a.txt",
        "dataset.test_file",
        "files to train on",
        "Move",
    ),
    source(
        "best of no evaluation",
        "a.txt",
        TEXT,
        "dataset.eval_samples=null trainer.save_strategy=best",
        "eval_loss",
        "no text to evaluate on",
        "dataset.eval_samples",
    ),
    override(
        "two evaluation texts",
        "dataset.validation_file=v.txt",
        "dataset.validation_file and dataset.eval_samples exclude each other",
    ),
    override(
        "two test texts",
        "dataset.test_file=v.txt dataset.test_samples=3",
        "dataset.test_file and dataset.test_samples exclude each other",
    ),
    override(
        "best without evaluating",
        "trainer.metric_for_best_model=eval_loss trainer.eval_strategy=no",
        "trainer.metric_for_best_model is eval_loss",
        "evaluates nothing",
    ),
    override("unknown metric", "trainer.metric_for_best_model=loss", "trainer.metric_for_best_model", "eval_accuracy"),
    override("W&B id of two words", "wandb.id='a b'", "wandb.id"),
    Row(
        "override: TensorBoard below a file",
        "SMOKE trainer.tensorboard_dir=file/board",
        ("trainer.tensorboard_dir", "is a file"),
        setup=lambda world: world.write("file", "x"),
    ),
    Row(
        "resume: best of a run without",
        "resume best --run run",
        ("has no best checkpoint", "trainer.metric_for_best_model"),
        setup=World.run,
    ),
    Row("export: best of a run without", "ckpt export run/best", ("has no best checkpoint",), setup=World.run),
    # ---- the token store -----------------------------------------------------------------------------------------
    Row(
        "store: of another tokenizer",
        f"{ON_STORE} tokenizer.train.vocab_size=512",
        ("tokenizer.train was", "512", "pre_tokenize_output"),
        setup=World.store,
    ),
    Row(
        "store: of other text",
        f"{ON_STORE} dataset.eval_samples=7",
        ("settings.eval_samples was 64, asked is 7", "delete"),
        setup=World.store,
    ),
    Row(
        "store: one flipped bit",
        ON_STORE,
        (TRAIN_DATA, "checksum", "damaged", "Delete"),
        setup=in_store(lambda store: flip(store / TRAIN_DATA)),
    ),
    Row(
        "store: truncated",
        ON_STORE,
        ("data-00000.arrow has", "damaged", "Delete"),
        setup=in_store(lambda store: cut(store / TRAIN_DATA)),
    ),
    Row(
        "store: file missing",
        ON_STORE,
        ("tokenizer.json is missing", "Delete"),
        setup=in_store(lambda store: (store / "tokenizer/tokenizer.json").unlink()),
    ),
    Row(
        "store: info missing",
        ON_STORE,
        ("tokenizer_info.json is missing", "Delete"),
        setup=in_store(lambda store: (store / "tokenizer_info.json").unlink()),
    ),
    Row(
        "store: manifest missing",
        ON_STORE,
        ("store is not a token store", "manifest.json"),
        setup=in_store(lambda store: (store / "manifest.json").unlink()),
    ),
    Row(
        "store: manifest no JSON",
        ON_STORE,
        ("manifest.json is damaged",),
        setup=in_store(lambda store: cut(store / "manifest.json")),
    ),
    Row(
        "store: another folder", ON_STORE, ("store is not a token store",), setup=lambda w: w.write("store/a.txt", "x")
    ),
    # ---- checkpoints and resuming --------------------------------------------------------------------------------
    Row(
        "resume: latest has a flipped bit",
        "resume latest --run run",
        ("Passed over checkpoint", "checkpoints/6", "damaged", WEIGHTS, "run/checkpoints/3."),
        code=0,
        writes=("run",),
        setup=in_run(lambda run: flip(run / "checkpoints/6" / WEIGHTS)),
    ),
    Row(
        "resume: the only one has a flipped bit",
        "resume latest --run run",
        ("no complete checkpoint", "6 is damaged", "backup"),
        setup=only_checkpoint(lambda path: flip(path / WEIGHTS)),
    ),
    Row(
        "resume: truncated shard",
        "resume 6 --run run",
        ("damaged", SHARD, "latest"),
        setup=in_run(lambda run: cut(run / "checkpoints/6" / SHARD)),
    ),
    Row(
        "resume: missing manifest",
        "resume latest --run run",
        ("6 is unverifiable", "manifest.json is missing"),
        setup=only_checkpoint(lambda path: (path / "manifest.json").unlink()),
    ),
    Row(
        "resume: damaged manifest",
        "resume latest --run run",
        ("6 is damaged", "manifest.json does not match"),
        setup=only_checkpoint(lambda path: flip(path / "manifest.json")),
    ),
    Row(
        "resume: manifest of another kind",
        "resume latest --run run",
        ("6 is damaged", "manifest.json"),
        setup=only_checkpoint(lambda path: (path / "manifest.json").write_text("[1, 2]")),
    ),
    Row(
        "resume: no checkpoints",
        "resume latest --run run",
        ("nothing to resume", "enc launch"),
        setup=in_run(lambda run: shutil.rmtree(run / "checkpoints")),
    ),
    Row(
        "resume: a step that is not there",
        "resume 4 --run run",
        ("no checkpoint", "checkpoints/4", "3, 6"),
        setup=World.run,
    ),
    Row(
        "resume: a path that is no checkpoint",
        "resume text --run run",
        ("text", "not a checkpoint"),
        setup=lambda world: (world.run(), world.write("text/a.txt", "x")),
    ),
    Row("resume: a path that is not there", "resume nothere --run run", ("nothere", "3, 6"), setup=World.run),
    Row(
        "resume: no such run folder",
        "resume latest --run nothere",
        ("nothere is not a run folder", "trainer.output_dir"),
    ),
    Row("resume: no run here", "resume latest", ("There is no run", "Name its folder")),
    Row(
        "resume: launch of what is not there",
        "SMOKE trainer.resume_from_checkpoint=latest trainer.output_dir=new/run",
        ("nothing to resume", "enc launch"),
    ),
    Row(
        "resume: changed config",
        "resume latest --run run optimizer.lr=0.5 seed=3",
        ("optimizer.lr: 0.001 -> 0.5", "seed: 1 -> 3", "--allow-change"),
        setup=World.run,
    ),
    Row(
        "resume: another model",
        "resume latest --run run --allow-change model.intermediate_size=256",
        ("do not fit the model", "ffn.w1.weight", "(88, 64)", "(176, 64)"),
        code=3,
        setup=World.run,
        writes=("run/!checkpoints",),
    ),
    Row(
        "resume: ranks that do not divide",
        "resume latest --run run --nproc 3",
        ("4 rows", "3 ranks", "1, 2, 4"),
        setup=World.run,
    ),
    Row("resume: store lost", "resume latest --run run dataset.path=nothere", ("nothere",), setup=World.run),
    Row(
        "resume: damaged config.yaml",
        "resume latest --run run",
        ("run/config.yaml:1", "is not a key"),
        setup=in_run(lambda run: (run / "config.yaml").write_text("sed: 1\n")),
    ),
    Row(
        "launch: an older run lies there",
        "SMOKE trainer.output_dir=run",
        ("already holds a run", "step 6", "enc resume latest --run", "overwrite_output_dir"),
        setup=World.run,
    ),
    Row(
        "ckpt verify: a flipped bit",
        "ckpt verify run",
        (),
        code=3,
        out=("checkpoints/6: damaged", WEIGHTS),
        setup=in_run(lambda run: flip(run / "checkpoints/6" / WEIGHTS)),
    ),
    Row(
        "ckpt verify: a folder without",
        "ckpt verify text",
        ("text holds no checkpoint", "DeepSpeed", ".safetensors"),
        setup=lambda w: w.write("text/a.txt", "x"),
    ),
    *(
        Row(
            f"ckpt {words.split()[0]}: a pickle that runs code",
            f"ckpt {words}",
            ("w.pt", "refused", "trust"),
            setup=_hostile,
        )
        for words in (
            "inspect w.pt",
            "verify w.pt",
            "diff w.pt w.pt",
            "consolidate w.pt --out out",
            "convert w.pt --to dcp --out out",
            "import w.pt --out out --config smoke",
        )
    ),
    Row("ckpt inspect: DCP metadata that runs code", "ckpt inspect dcp", (".metadata", "refused"), setup=_hostile),
    Row("ckpt inspect: a text file", "ckpt inspect a.txt", ("a.txt is not a file of weights", ".safetensors")),
    Row(
        "ckpt consolidate: a shard is missing",
        "ckpt consolidate hf --out out",
        ("hf is incomplete", "b.safetensors", "Copy"),
        setup=lambda w: w.write("hf/model.safetensors.index.json", '{"weight_map": {"x": "b.safetensors"}}'),
    ),
    Row(
        "ckpt consolidate: no safetensors file",
        "ckpt consolidate w.safetensors --out out",
        ("w.safetensors is damaged", "header"),
        setup=lambda w: w.write("w.safetensors", b"\0" * 100),
    ),
    Row(
        "ckpt consolidate: damaged run",
        "ckpt consolidate run/checkpoints/6 --out out",
        ("damaged", WEIGHTS),
        setup=in_run(lambda run: flip(run / "checkpoints/6" / WEIGHTS)),
    ),
    Row(
        "ckpt consolidate: place taken",
        "ckpt consolidate run --out text",
        ("text", "not empty"),
        setup=lambda world: (world.run(), world.write("text/a.txt", "x")),
    ),
    Row(
        "ckpt verify: a foreign file cut short",
        "ckpt verify w.safetensors --json",
        (),
        code=3,
        out=('"state": "damaged"', "it has 68 bytes"),
        setup=lambda w: (save_file({"w": torch.ones(2)}, w.folder / "w.safetensors"), cut_end(w.folder)),
    ),
    Row(
        "ckpt consolidate: a name with an escape sequence",
        "ckpt consolidate w.pt --out out",
        (r"\x1b[2J is complex128, which safetensors cannot hold",),
        setup=lambda w: torch.save({"\x1b[2J": torch.ones(1, dtype=torch.complex128)}, w.folder / "w.pt"),
    ),
    Row(
        "ckpt inspect: a name with an escape sequence",
        "ckpt inspect w.safetensors",
        (),
        code=0,
        out=(r"\x1b[2J\nw",),
        setup=lambda w: save_file({"\x1b[2J\nw": torch.ones(2)}, w.folder / "w.safetensors"),
    ),
    Row(
        "ckpt diff: values that JSON does not know",
        "ckpt diff one two --json",
        (),
        code=1,
        out=('"2024-01-01"', '"nan"', '"inf"'),
        setup=lambda w: (with_config(w, "one", "2024-01-01\nx: .nan\n"), with_config(w, "two", "1\nx: .inf\n")),
    ),
    Row(
        "ckpt inspect: no counters",
        "ckpt inspect run/checkpoints/6",
        ("damaged", "trainer_state.json", "it holds no counters"),
        setup=in_run(lambda run: (run / "checkpoints/6/trainer_state.json").write_text("[]")),
    ),
    Row(
        "ckpt ls: no counters",
        "ckpt ls run",
        (),
        code=0,
        out=("6  complete",),
        setup=in_run(lambda run: without_state(run / "checkpoints/6")),
    ),
    Row(
        "ckpt prune: no counters",
        "ckpt prune run --keep 1",
        ("checkpoints/6 has no trainer_state.json", "Nothing was deleted"),
        setup=in_run(lambda run: without_state(run / "checkpoints/6")),
    ),
    Row(
        "ckpt export: no counters",
        "ckpt export run",
        ("checkpoints/6 has no trainer_state.json", "Choose another"),
        setup=in_run(lambda run: without_state(run / "checkpoints/6")),
    ),
    Row(
        "ckpt consolidate: a dangling link",
        "ckpt consolidate run --out link",
        ("link is a symbolic link", "Name the place"),
        setup=lambda w: (w.run(), (w.folder / "link").symlink_to("nothere")),
    ),
    Row("ckpt prune: keep none", "ckpt prune run --keep 0", ("--keep",), setup=World.run),
    Row("ckpt prune: no run", "ckpt prune text --keep 1", ("text is not a run folder",)),
    Row(
        "ckpt import: another model", "ckpt import w.safetensors --out new", ("--tokenizer DIR",), setup=_run_and_other
    ),
    Row(
        "ckpt import: another tokenizer",
        "ckpt import w.safetensors --out new --tokenizer run/checkpoints/6/tokenizer",
        ("not a NeoBERT", "model.encoder.weight"),
        setup=_run_and_other,
    ),
    Row("ckpt verify: nothing there", "ckpt verify nothere", ("nothere",)),
    Row("ckpt ls: nothing there", "ckpt ls nothere", ("nothere is not a run folder",)),
    Row("ckpt inspect: nothing there", "ckpt inspect nothere", ("nothere",)),
    # ---- what is made from checkpoints ---------------------------------------------------------------------------
    Row(
        "export: folder not empty",
        "ckpt export run --out text",
        ("text", "not empty"),
        setup=lambda world: (world.run(), world.write("text/a.txt", "x")),
    ),
    Row(
        "export: a file of weights",
        "ckpt export w.safetensors",
        ("w.safetensors is a file", "enc ckpt import"),
        setup=lambda world: save_file({"w": torch.ones(2)}, world.folder / "w.safetensors"),
    ),
    Row("export: fp8", "ckpt export run --dtype fp8", ("'fp8'", "fp32, bf16"), setup=World.run),
    Row(
        "export: damaged",
        "ckpt export run/checkpoints/6",
        ("damaged", WEIGHTS),
        setup=in_run(lambda run: flip(run / "checkpoints/6" / WEIGHTS)),
    ),
    Row(
        "eval: store without eval split",
        "eval mlm run --store SMALL/same",
        ("no split 'eval'", "it has train"),
        setup=World.run,
    ),
    Row("eval: store of another tokenizer", "eval mlm run --store SMALL/other", ("tokenizer", "128"), setup=World.run),
    Row("eval: no store", "eval mlm run --store nothere", ("nothere is not a token store",), setup=World.run),
    Row("report: no run", "report text", ("text is not a run folder",), setup=lambda w: w.write("text/a.txt", "x")),
]


# --- what the rows share ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def small_stores(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str], store: Path) -> Path:
    """Two stores without an eval split: `same` has the tokenizer of the finished run, `other` has another one."""

    def make(folder: Path) -> Path:
        (folder / "a.txt").write_text(TEXT)
        enc = Enc(folder, environment)
        words = ["preprocess", "smoke", "dataset.path=a.txt", "dataset.eval_samples=null"]
        enc(*words, "dataset.pre_tokenize_output=same", "tokenizer.train=null", f"tokenizer.path={store / 'tokenizer'}")
        enc(*words, "dataset.pre_tokenize_output=other", "tokenizer.train.vocab_size=128")
        return folder

    return made_once(tmp_path_factory, "small_stores", make)


@pytest.fixture
def world(enc: Enc, request: pytest.FixtureRequest) -> World:
    """An empty working folder with the file `a.txt`."""
    world = World(enc.folder, request.getfixturevalue)
    world.write("a.txt", "A text.\n")
    return world


def snapshot(folder: Path) -> dict[str, str]:
    """Return every folder and file below `folder`, files with a hash; a run's lock file is not looked at."""
    entries = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.name != ".lock":
            entries[name] = hashlib.blake2b(path.read_bytes()).hexdigest() if path.is_file() else "folder"
    return entries


def changes(before: dict[str, str], after: dict[str, str], allowed: tuple[str, ...]) -> list[str]:
    """Return what differs outside of the allowed folders; `run/!checkpoints` allows `run` without its checkpoints."""

    def is_allowed(name: str) -> bool:
        for pattern in allowed:
            root, _, kept = pattern.partition("/!")
            if (name == root or name.startswith(f"{root}/")) and not (kept and name.startswith(f"{root}/{kept}")):
                return True
        return False

    names = sorted({*before, *after})
    return [name for name in names if before.get(name) != after.get(name) and not is_allowed(name)]


def check_message(text: str) -> None:
    """Check the form of what a failing command said: short, one paragraph, no traceback."""
    assert "Traceback" not in text
    assert "unexpected" not in text
    lines = [line for line in text.strip().splitlines() if not line.startswith("Note: ")]
    assert len(lines) <= MAX_LINES, text
    assert "\n\n" not in text.strip(), text
    assert not text.startswith("\n"), "an empty line before the message"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_bad_input(row: Row, enc: Enc, world: World) -> None:
    """The command ends with its exit code and a useful message, and changes nothing that it must not change."""
    row.setup(world)
    before = snapshot(enc.folder)
    command = row.command.replace("SMOKE", "launch pretrain smoke READY trainer.output_dir=new/run")
    for word, fixture in {"READY": "store", "SMALL": "small_stores"}.items():
        if word in command:
            option = "dataset.pre_tokenize_output=" if word == "READY" else ""
            command = command.replace(word, f"{option}{world.finished(fixture)}")
    done = enc(*shlex.split(command), code=row.code)
    if row.code == 2:
        check_message(done.stderr)
    said = " ".join(done.stderr.split())
    for fragment in row.says:
        assert fragment in said, f"{fragment!r} is not in:\n{done.stderr}"
    for fragment in row.out:
        assert fragment in done.stdout, f"{fragment!r} is not in:\n{done.stdout}"
    assert "Traceback" not in done.stderr
    assert changes(before, snapshot(enc.folder), row.writes) == []


# --- what takes more than one command --------------------------------------------------------------------------------


def test_diverging_run_stops_and_keeps_a_good_checkpoint(enc: Enc, smoke: Callable[..., list[str]]) -> None:
    """A learning rate that is far too large ends with code 3 after the budget; the last good checkpoint stays."""
    words = ["optimizer.lr=1e30", "scheduler.warmup_steps=0", "trainer.max_nonfinite_steps=2", "trainer.save_steps=1"]
    done = enc(*smoke("run", *words, "trainer.save_total_limit=1", "trainer.eval_strategy=no"), code=3)
    said = " ".join(done.stderr.split())
    assert "Traceback" not in said
    for fragment in ("3 steps had a non-finite loss", "allows 2", "Lower optimizer.lr", "enc ckpt ls"):
        assert fragment in said
    events = [event["event"] for event in enc.events("run")]
    assert events.count("skipped_step") == 3
    assert events[-1] == "failed"
    listed = json.loads(enc("ckpt", "ls", "run", "--json").stdout)
    assert all(row["state"] == "complete" for row in listed)
    states = [json.loads((enc.folder / row["path"] / "trainer_state.json").read_text()) for row in listed]
    assert [state["step"] for state in states if state["loss_is_finite"]] == [1]


def test_second_run_in_a_folder_is_refused(enc: Enc, smoke: Callable[..., list[str]]) -> None:
    """While a run is at work its folder is taken; the refusal names the process and disturbs nothing."""
    first = enc.start(*smoke("run", "trainer.max_steps=100000", "trainer.save_steps=100000", "dataset.num_workers=0"))
    try:
        _wait_for(enc.folder / "run" / "metrics.jsonl", first)
        config_text = (enc.folder / "run" / "config.yaml").read_text()
        for words in (smoke("run", "seed=2"), ["resume", "latest", "--run", "run"]):
            said = " ".join(enc(*words, code=2).stderr.split())
            assert "is in use by process" in said
            assert "choose another trainer.output_dir" in said
            assert first.poll() is None
        assert (enc.folder / "run" / "config.yaml").read_text() == config_text
        assert [path.name for path in (enc.folder / "run" / "launches").iterdir()] == ["1"]
    finally:
        first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 75
    steps = list(enc.records("run"))
    assert steps == list(range(1, len(steps) + 1))


def _wait_for(path: Path, process: subprocess.Popen) -> None:
    limit = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < limit and not (path.exists() and path.stat().st_size):
        time.sleep(0.05)


@pytest.fixture
def small_disk(enc: Enc) -> Iterator[Path]:
    """A file system of 8 MB, mounted at `disk`."""
    folder = enc.folder / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=8m", "enc-test", str(folder)]
    try:
        mounted = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_disk_that_fills_during_a_save(enc: Enc, smoke: Callable[..., list[str]], small_disk: Path) -> None:
    """The tensors still fit, the files beside them do not: code 3, nothing half-written, the one before is whole."""
    words = ["trainer.save_steps=20", "trainer.max_steps=30", "trainer.eval_strategy=no", "dataset.num_workers=0"]
    enc(*smoke("disk/run", *words, "trainer.max_steps=20"))
    first = small_disk / "run" / "checkpoints" / "20"
    resume = ["resume", "latest", "--run", "disk/run", "--allow-change", "trainer.max_steps=100000"]
    process = enc.start(*resume, "trainer.save_steps=100000")
    _wait_for(small_disk / "run" / "logs" / "2" / "console.log", process)
    tensors = sum(path.stat().st_size for path in first.rglob("*.safetensors"))
    (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free - tensors - 2**15))
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 3
    said = " ".join((enc.folder / "background.log").read_text().split())
    assert "Traceback" not in said
    for fragment in ("could not be written and was removed again", "No space left", "Earlier checkpoints are intact"):
        assert fragment in said
    assert list((small_disk / "run" / "checkpoints").iterdir()) == [first]
    enc("ckpt", "verify", "disk/run")
    (small_disk / "ballast").unlink()
    enc(*resume[:5], "trainer.max_steps=22", "trainer.save_total_limit=1")


def test_disk_that_fills_during_a_run(enc: Enc, smoke: Callable[..., list[str]], small_disk: Path) -> None:
    """When no checkpoint fits any more the run ends with code 3, the earlier ones are whole, and room lets it go on."""
    words = ["trainer.save_steps=1", "trainer.save_total_limit=0", "trainer.max_steps=12", "dataset.num_workers=0"]
    said = " ".join(enc(*smoke("disk/run", *words, "trainer.eval_strategy=no"), code=3).stderr.split())
    assert "Traceback" not in said
    for fragment in ("too full for a checkpoint", "are missing", "Nothing was written", "enc resume latest"):
        assert fragment in said
    assert enc.events("disk/run")[-1]["event"] == "failed"
    run = small_disk / "run"
    enc("ckpt", "verify", "disk/run")
    steps = sorted(int(path.name) for path in (run / "checkpoints").iterdir())
    assert steps == list(range(1, len(steps) + 1))
    for step in steps[:-1]:
        shutil.rmtree(run / "checkpoints" / str(step))
    enc("resume", "latest", "--run", "disk/run", "trainer.save_total_limit=1")
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["12"]
