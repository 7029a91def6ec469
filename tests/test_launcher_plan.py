"""The engine that `auto` chooses, what `enc plan` compares, and the files that a run folder gets."""

import json
from pathlib import Path

import pytest
import yaml
from running import Enc

from enc.encoder.config import RunConfig
from enc.encoder.config_load import load_config
from enc.encoder.errors import UsageError
from enc.encoder.gpus import find_gpu, gpu_of_device
from enc.launcher.choose import choose_engine
from enc.launcher.compare import Cluster, recommendation, variants
from enc.launcher.plan import make_plan, render

CONFIG = load_config("neobert-250m").config


def changed(**parallel: object) -> RunConfig:
    return CONFIG.changed({f"parallel.{key}": value for key, value in parallel.items()})


@pytest.mark.parametrize(
    ("config", "ranks", "gigabytes", "engine", "why"),
    [
        (CONFIG, 8, 80, "ddp", "a whole copy fits: about 36.6 of 80.0 GB"),
        (CONFIG, 8, 38, "fsdp", "a whole copy needs about 36.6 of 38.0 GB"),
        (CONFIG, 8, 20, "fsdp", "it may not fit (about 33.1 of 20.0 GB): try trainer.gradient_checkpointing true or "
                                "a smaller trainer.per_device_train_batch_size or parallel.offload parameters"),
        (CONFIG, 1, 80, "ddp", "one process"),
        (CONFIG, 1, 20, "ddp", "one process; it may not fit"),
        (CONFIG, 8, None, "ddp", "the memory of a device is not known"),
        (changed(offload="optimizer"), 8, 80, "deepspeed", "parallel.offload optimizer needs it"),
        (changed(offload="parameters"), 8, 80, "fsdp", "parallel.offload parameters needs it"),
        (changed(replicate=2), 8, 80, "fsdp", "parallel.replicate 2 needs it"),
        (changed(reduce_dtype="bf16"), 8, 80, "fsdp", "parallel.reduce_dtype bf16 needs it"),
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


def test_render_prints_or_writes_the_same_text(enc: Enc) -> None:
    """The path of a written file is the last line of stdout."""
    words = ("render", "deepspeed", "smoke", "--nproc", "2", "parallel.zero_stage=3")
    printed = enc(*words).stdout
    assert json.loads(printed)["zero_optimization"]["stage"] == 3
    path = Path(enc(*words, "--to", "here").stdout.splitlines()[-1])
    assert (enc.folder / path).read_text() == printed
    assert json.loads(enc("render", "fsdp", "smoke", "--nodes", "3").stdout)["mesh"] == {"replicate": 1, "shard": 3}


def test_a_run_folder_names_its_engine_and_holds_its_settings(tmp_path: Path) -> None:
    """`auto` is resolved, and the user's own JSON goes into the config, so that the folder needs no other file."""
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"zero_optimization": {"stage": "auto", "round_robin_gradients": True}}))
    config = load_config("smoke", {"launch.nproc_per_node": 2, "trainer.output_dir": str(tmp_path / "run")}).config
    files = render(make_plan(config))
    assert set(files) == {"config.yaml"}
    assert yaml.safe_load(files["config.yaml"])["parallel"]["engine"] == "ddp"
    asked = {"parallel.engine": "deepspeed", "parallel.deepspeed_config": str(own)}
    files = render(make_plan(config.changed(asked)))
    assert set(files) == {"config.yaml", "ds_config.json"}
    kept = yaml.safe_load(files["config.yaml"])["parallel"]["deepspeed_config"]
    assert kept == {"zero_optimization": {"round_robin_gradients": True}}
    assert json.loads(files["ds_config.json"])["zero_optimization"]["round_robin_gradients"] is True
    assert set(render(make_plan(config.changed({"parallel.engine": "fsdp"})))) == {"config.yaml", "fsdp.json"}
