"""The engine that `auto` chooses, what `enc plan` compares, and the files that a run folder gets."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from running import Enc

from enc.encoder.config.checks import unused_settings
from enc.encoder.config.load import load_config
from enc.encoder.config.schema import RunConfig
from enc.encoder.errors import UsageError
from enc.encoder.gpus import find_gpu, gpu_of_device
from enc.launcher.cli.app import app
from enc.launcher.machine.facts import MachineFacts, look
from enc.launcher.machine.gpus import InstalledGpu
from enc.launcher.planning.engine_choice import choose_engine
from enc.launcher.planning.estimate import Cluster, recommendation, variants
from enc.launcher.planning.plan import after_tokenising, make_plan, plan_run
from enc.launcher.planning.render import render
from enc.launcher.planning.token_store import look_at_store

CONFIG = load_config("neobert-250m").config


def changed(**parallel: object) -> RunConfig:
    return CONFIG.changed({f"parallel.{key}": value for key, value in parallel.items()})


@pytest.mark.parametrize(
    ("config", "ranks", "gigabytes", "engine", "why"),
    [
        (CONFIG, 8, 80, "ddp", "a whole copy fits: about 35.9 of 80.0 GB"),
        (CONFIG, 8, 38, "fsdp", "a whole copy needs about 35.9 of 38.0 GB"),
        (CONFIG, 8, 20, "fsdp", "it may not fit (about 32.4 of 20.0 GB): try trainer.gradient_checkpointing true or "
                                "a smaller trainer.per_device_train_batch_size or parallel.offload parameters"),
        (CONFIG, 1, 80, "ddp", "one process"),
        (CONFIG, 1, 20, "ddp", "one process; it may not fit"),
        (CONFIG, 8, None, "ddp", "the memory of a device is not known"),
        (changed(offload="optimizer"), 8, 80, "deepspeed", "parallel.offload optimizer needs it"),
        (changed(offload="parameters"), 8, 80, "fsdp", "parallel.offload parameters needs it"),
        (changed(replicate=2), 8, 80, "fsdp", "parallel.replicate 2 needs it"),
        (changed(reduce_dtype="bf16"), 8, 80, "fsdp", "parallel.reduce_dtype bf16 needs it"),
        (changed(zero_stage=3), 1, 80, "deepspeed", "parallel.zero_stage 3 needs it"),
        (changed(zero_stage=3, offload="parameters"), 8, 80, "deepspeed", "parallel.zero_stage 3 needs it"),
        (changed(zero_stage=2), 8, 80, "ddp", "a whole copy fits"),
        (changed(engine="deepspeed"), 8, 80, "deepspeed", "as the config says"),
        (changed(engine="deepspeed"), 8, 20, "deepspeed", "as the config says; it may not fit"),
    ],
)  # fmt: skip
def test_auto_chooses_the_simplest_engine_that_fits(
    config: RunConfig, ranks: int, gigabytes: float | None, engine: str, why: str
) -> None:
    """DDP, else FSDP; a setting that only one engine has decides before that."""
    chosen, reason = choose_engine(config, ranks, None if gigabytes is None else int(gigabytes * 1e9))
    assert chosen == engine
    assert why in reason


@pytest.mark.parametrize(
    ("parallel", "says"),
    [
        ({"offload": "optimizer", "zero_stage": 0},
         "parallel.offload is optimizer, which needs parallel.zero_stage 1, 2 or 3 (parallel.engine auto took deepspeed"
         ": parallel.offload optimizer needs it)."),
        ({"offload": "optimizer", "replicate": 2}, "parallel.replicate is 2, which needs parallel.engine fsdp (parallel"
                                                   ".engine auto took deepspeed"),
        ({"offload": "parameters", "zero_stage": 1}, "which needs parallel.zero_stage 3, not 1 (parallel.engine auto"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_with_the_chosen_engine_are_refused(parallel: dict, says: str) -> None:
    """Once `auto` has chosen, the rules of a named engine hold; the message says which was taken, and why."""
    keys = {f"parallel.{key}": value for key, value in parallel.items()}
    config = load_config("smoke", {"launch.nproc_per_node": 2, **keys}).config
    with pytest.raises(UsageError) as error:
        plan_run(config, look())
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("parallel", "says"),
    [
        ({"engine": "ddp", "bucket_size": 7}, ["parallel.bucket_size has no effect with engine ddp."]),
        ({"engine": "fsdp", "zero_stage": 3}, ["parallel.zero_stage has no effect with engine fsdp."]),
        ({"engine": "deepspeed", "reshard_after_forward": False},
         ["parallel.reshard_after_forward has no effect with engine deepspeed."]),
        ({"engine": "deepspeed", "bucket_size": 7, "zero_stage": 0},
         ["parallel.bucket_size has no effect with parallel.zero_stage 0."]),
        ({"engine": "ddp", "activation_checkpointing": "selective", "activation_checkpointing_every": 2},
         ["parallel.activation_checkpointing has no effect without trainer.gradient_checkpointing.",
          "parallel.activation_checkpointing_every has no effect without trainer.gradient_checkpointing."]),
        ({"engine": "ddp", "zero_stage": 2, "bucket_size": 50_000_000}, []),
        ({"engine": "deepspeed", "zero_stage": 3, "bucket_size": 7}, []),
        ({"engine": "fsdp", "reshard_after_forward": False}, []),
    ],
)  # fmt: skip
def test_changed_settings_without_effect_are_named(parallel: dict, says: list[str]) -> None:
    """One sentence each; a value that is the default one is nobody's wish."""
    assert list(unused_settings(changed(**parallel))) == says


def test_dry_run_and_launch_note_settings_without_effect(enc: Enc, smoke: Callable[..., list[str]]) -> None:
    """On stderr, so that stdout stays JSON."""
    words = ["parallel.engine=ddp", "parallel.bucket_size=7"]
    note = "Note: parallel.bucket_size has no effect with engine ddp."
    dry = enc(*smoke("run", *words, "--dry-run", "--json"))
    assert dry.stderr.splitlines().count(note) == 1
    json.loads(dry.stdout)
    done = enc(*smoke("run", *words, "trainer.max_steps=1", "trainer.eval_strategy=no", "dataset.num_workers=0"))
    assert done.stderr.splitlines().count(note) == 1


def test_variants_are_compared_and_one_is_recommended() -> None:
    """The first that fits is recommended, with its settings; hybrid sharding is there on several nodes only."""
    cluster = Cluster(2, 8, find_gpu("h100-80gb"))
    found = variants(CONFIG, cluster)
    assert found[0].name == "ddp"
    assert found[0].fits
    assert {"fsdp in a node", "fsdp", "zero 1", "zero 2", "zero 3"} <= {variant.name for variant in found}
    assert "fsdp in a node" not in {variant.name for variant in variants(CONFIG, Cluster(1, 8, cluster.gpu))}
    assert recommendation(CONFIG, cluster, found).startswith("Use parallel.engine=ddp: it fits")


def test_where_nothing_fits_the_advice_says_what_to_change() -> None:
    small = Cluster(1, 8, find_gpu("l4-24gb"))
    text = recommendation(CONFIG, small, variants(CONFIG, small))
    assert text.startswith("Nothing fits as it is: use parallel.engine=ddp with trainer.per_device_train_batch_size=")
    assert text.endswith("or trainer.gradient_checkpointing=true.")
    huge = CONFIG.changed({"model.hidden_size": 65536, "trainer.gradient_checkpointing": True})
    assert recommendation(huge, small, variants(huge, small)) == (
        "Nothing fits: use more GPUs, or GPUs with more memory."
    )


def test_gpus_are_found_by_name_and_by_what_cuda_calls_them() -> None:
    assert gpu_of_device("NVIDIA H100 80GB HBM3").bf16_flops == 989e12
    assert gpu_of_device("NVIDIA H100 PCIe").name == "h100-pcie-80gb"
    assert gpu_of_device("NVIDIA A10G").name == "a10-24gb"
    assert gpu_of_device("NVIDIA L40S").name == "l40s-48gb"
    assert gpu_of_device("Tesla T4") is None
    with pytest.raises(UsageError, match=r"--gpu h100 is not known; did you mean h100-80gb\?"):
        find_gpu("h100")


def test_plan_prints_what_it_computed(enc: Enc) -> None:
    """The page is for a person, 80 columns; --json has the same numbers and needs no data."""
    page = enc("plan", "neobert-250m", "--nodes", "2", "--nproc", "8", "--gpu", "h100-80gb")
    assert max(map(len, page.stdout.splitlines())) <= 80
    facts = json.loads(enc("plan", "neobert-250m", "--nodes", "2", "--nproc", "8", "--json").stdout)
    assert facts["tokens_per_step"] == 2048 * 1024
    assert facts["hours"] == pytest.approx(facts["flops_per_step"] * facts["max_steps"] / (16 * 989e12 * 0.4) / 3600)
    for variant in facts["variants"]:
        assert variant["name"] in page.stdout
    assert list(enc.folder.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "shows"),
    [
        (["model.intermediate_size=1000000000000"], ["43.0 P parameters", "516.1 PB each", "years"]),
        (["--nodes", "200000000", "--nproc", "8", "trainer.global_batch_size=null"], ["1,600,000,000 ranks"]),
        (["trainer.max_steps=100000000000000000000000"], ["years at 40%"]),
        (["--nproc", "1", "trainer.max_steps=1", "trainer.global_batch_size=1"],
         ["1 row = 1 rank x 1 microbatch x 1 row of", "1 step of", "seconds at 40%"]),
    ],
    ids=["huge model", "many machines", "many steps", "one of each"],
)  # fmt: skip
def test_plan_lays_out_numbers_of_any_size(enc: Enc, words: list[str], shows: list[str]) -> None:
    """80 columns, and the columns of the table stay apart."""
    lines = enc("plan", "neobert-250m", *words).stdout.splitlines()
    assert max(map(len, lines)) <= 80
    start = next(index for index, line in enumerate(lines) if line.startswith("GB a GPU"))
    for line in lines[start + 1 : lines.index("", start)]:
        assert line[26] == line[34] == line[42] == line[50] == " ", line
        assert line[52:58].strip() in ("yes", "no")
    text = " ".join(" ".join(lines).split())
    for fragment in shows:
        assert fragment in text


def test_render_prints_or_writes_the_same_text(enc: Enc) -> None:
    """The path of a written file is the last line of stdout."""
    words = ("render", "deepspeed", "smoke", "--nproc", "2", "parallel.zero_stage=3")
    printed = enc(*words).stdout
    assert json.loads(printed)["zero_optimization"]["stage"] == 3
    path = Path(enc(*words, "--to", "here").stdout.splitlines()[-1])
    assert (enc.folder / path).read_text() == printed
    assert json.loads(enc("render", "fsdp", "smoke", "--nodes", "3").stdout)["mesh"] == {"replicate": 1, "shard": 3}


def machine(**changes: object) -> MachineFacts:
    """A machine with two GPUs of 80 GB, unless changed."""
    gpu = InstalledGpu("0", "NVIDIA H100", "580", 81559, 4, "9.0")
    return replace(look(), **{"num_gpus": 2, "list_gpus": lambda: [gpu, gpu], **changes})


def test_a_plan_follows_from_the_facts_alone(store: Path) -> None:
    """One rank a GPU, an engine by its memory; the machine that the test runs on has no say."""
    config = load_config("smoke").config
    made = look_at_store(config.dataset.model_copy(update={"pre_tokenize_output": str(store)}))
    plan = make_plan(config, machine(cwd=Path("/elsewhere")), made)
    assert (plan.run_dir, plan.device, plan.split.world_size) == (Path("/elsewhere/runs/smoke"), "cuda", 2)
    assert plan.device_bytes == 81559 * 2**20
    assert plan.engine_reason.startswith("a whole copy fits")
    small = replace(machine().gpus[0], total=1)
    assert make_plan(config, machine(list_gpus=lambda: [small]), made).engine == "fsdp"
    assert make_plan(config.changed({"trainer.use_cpu": True}), machine(), made).device == "cpu"


def test_gpus_are_asked_for_once_and_only_when_they_count(store: Path) -> None:
    """nvidia-smi takes up to seconds."""
    calls: list[int] = []
    gpu = InstalledGpu("0", "NVIDIA H100", "580", 81559, 4, "9.0")
    facts = machine(list_gpus=lambda: calls.append(1) or [gpu])
    config = load_config("smoke").config
    for asked in (config.changed({"trainer.use_cpu": True}), config.changed({"launch.gpu": "h100-80gb"})):
        plan_run(asked, facts)
    assert not calls
    for _ in range(2):
        plan_run(config, facts)
    assert len(calls) == 1


@pytest.mark.parametrize("expected", [1024, 5000])
def test_a_store_that_was_made_meanwhile_settles_the_plan(store: Path, tmp_path: Path, expected: int) -> None:
    """The plan is the one that would have been made with the store there, whatever vocabulary was expected."""
    keys = {"dataset.pre_tokenize_output": str(tmp_path / "store"), "tokenizer.train.vocab_size": expected}
    config, facts = load_config("smoke", keys).config, look()
    before = plan_run(config, facts)
    assert not before.store_ready
    (tmp_path / "store").symlink_to(store)
    made = look_at_store(config.dataset)
    assert after_tokenising(before, made) == make_plan(config, facts, made)


def test_a_dry_run_looks_plans_and_opens_once(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing that an earlier stage knows is asked for again."""
    calls: list[str] = []
    for module, name in (
        ("enc.launcher.machine.facts", "look"),
        ("enc.launcher.planning.plan", "make_plan"),
        ("enc.launcher.planning.token_store", "open_manifest"),
        ("enc.encoder.config.load", "load_config"),
    ):
        function = getattr(import_module(module), name)
        monkeypatch.setattr(f"{module}.{name}", partial(_counted, calls, name, function))
    monkeypatch.chdir(tmp_path)
    words = ["launch", "pretrain", "smoke", f"dataset.pre_tokenize_output={store}", "--dry-run"]
    assert app(words, standalone_mode=False) is None
    assert sorted(calls) == ["load_config", "look", "make_plan", "open_manifest"]
    assert "token store" in capsys.readouterr().out


def _counted(calls: list[str], name: str, function: Callable[..., Any], *args: Any, **keys: Any) -> Any:
    calls.append(name)
    return function(*args, **keys)


def test_a_run_folder_names_its_engine_and_holds_its_settings(tmp_path: Path) -> None:
    """`auto` is resolved, and the user's own JSON goes into the config, so that the folder needs no other file."""
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"zero_optimization": {"stage": "auto", "round_robin_gradients": True}}))
    config = load_config("smoke", {"launch.nproc_per_node": 2, "trainer.output_dir": str(tmp_path / "run")}).config
    files = render(plan_run(config, look()))
    assert set(files) == {"config.yaml"}
    assert yaml.safe_load(files["config.yaml"])["parallel"]["engine"] == "ddp"
    asked = {"parallel.engine": "deepspeed", "parallel.deepspeed_config": str(own)}
    files = render(plan_run(config.changed(asked), look()))
    assert set(files) == {"config.yaml", "ds_config.json"}
    kept = yaml.safe_load(files["config.yaml"])["parallel"]["deepspeed_config"]
    assert kept == {"zero_optimization": {"round_robin_gradients": True}}
    assert json.loads(files["ds_config.json"])["zero_optimization"]["round_robin_gradients"] is True
    assert set(render(plan_run(config.changed({"parallel.engine": "fsdp"}), look()))) == {"config.yaml", "fsdp.json"}
