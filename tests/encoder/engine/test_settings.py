"""What DeepSpeed and FSDP are told follows from the run config; a user's own JSON adds to it or is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from places import TESTS
from rendered import CASES, RENDERED, rendered

from enc.encoder.config.schema import RunConfig, flatten
from enc.encoder.engine.settings import (
    BASES,
    deepspeed_settings,
    engine_files,
    fsdp_settings,
    own_settings,
    read_settings,
)
from enc.encoder.engine.user_json import KEYS
from enc.encoder.errors import UsageError
from enc.encoder.sizing.batch_split import BatchSplit

SPLIT = BatchSplit(world_size=4, accumulation=2, rows_per_microbatch=8)
# What the Trainer of transformers fills in (integrations/deepspeed.py, trainer_config_process and _finalize).
FILLED_BY_HF = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
                "gradient_clipping", "bf16.enabled"}  # fmt: skip


def run_config(own: Any = None, **parallel: Any) -> RunConfig:
    changes = {f"parallel.{key}": value for key, value in parallel.items()}
    return RunConfig().changed({"parallel.engine": "deepspeed", "parallel.deepspeed_config": own, **changes})


@pytest.mark.parametrize("case", CASES)
def test_rendered_files_are_the_golden_ones(case: str) -> None:
    """Byte for byte. `python tests/support/rendered.py` writes them anew; read the difference before you commit it."""
    assert rendered(case) == (RENDERED / f"{case}.json").read_text()


def test_every_golden_file_has_a_case() -> None:
    assert {path.stem for path in RENDERED.iterdir()} == set(CASES)


@pytest.mark.parametrize("path", sorted(BASES.glob("zero*.json")), ids=lambda path: path.stem)
def test_bases_work_with_the_hf_trainer(path: Path) -> None:
    """They leave `auto` only where it is filled in, and hold known keys only."""
    flat = flatten(json.loads(path.read_text()))
    assert {key for key, value in flat.items() if value == "auto"} <= FILLED_BY_HF
    assert set(flat) <= set(flatten(json.loads(KEYS.read_text())))


def test_the_installed_deepspeed_has_the_keys_of_the_table() -> None:
    """A new DeepSpeed shows up here. `python tests/support/deepspeed_keys.py > ds_configs/keys.json` takes it over."""
    words = [sys.executable, TESTS / "support" / "deepspeed_keys.py"]
    found = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(found.stdout) == json.loads(KEYS.read_text())


def test_the_installed_deepspeed_accepts_every_rendered_file() -> None:
    """Its own config class reads them all; batch sizes are those of one rank there."""
    code = (
        "import json, pathlib, sys\nfrom deepspeed.runtime.config import DeepSpeedConfig\n"
        "for path in sorted(pathlib.Path(sys.argv[1]).glob('zero*.json')):\n"
        "    settings = json.loads(path.read_text())\n"
        "    settings['train_batch_size'] //= 4\n"
        "    config = DeepSpeedConfig(settings)\n"
        "    assert config.zero_config.stage == int(path.stem[4]), path\n"
    )
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    subprocess.run([sys.executable, "-c", code, RENDERED], timeout=120, check=True, env=environment)


def test_fsdp_mesh_is_the_ranks() -> None:
    """Replicas times shards are the ranks; replicas that do not divide them are refused."""
    assert fsdp_settings(run_config(replicate=2), SPLIT)["mesh"] == {"replicate": 2, "shard": 2}
    with pytest.raises(UsageError, match=r"parallel.replicate is 3, which does not divide the 4 ranks"):
        fsdp_settings(run_config(replicate=3), SPLIT)


def test_an_odd_bucket_is_rounded_up() -> None:
    """DeepSpeed asserts that the buckets of ZeRO 1 and 2 are even."""
    zero = deepspeed_settings(run_config(bucket_size=1001), SPLIT)["zero_optimization"]
    assert zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == 1002


# --- the user's own JSON ---------------------------------------------------------------------------------------------

HF_EXAMPLE = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": 1e-8, "weight_decay": 0.01}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_num_steps": "auto"}},
    "zero_optimization": {
        "stage": 2, "offload_optimizer": {"device": "none", "pin_memory": True}, "overlap_comm": False,
        "allgather_bucket_size": 2e8, "stage3_param_persistence_threshold": "auto",
    },
    "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": 8, "steps_per_print": 2000,
}  # fmt: skip


def test_an_example_of_the_hf_documentation_is_accepted() -> None:
    """What says the same as the run config or `auto` adds nothing; the rest lies over our settings."""
    added = {
        "zero_optimization": {"overlap_comm": False, "allgather_bucket_size": 200_000_000},
        "steps_per_print": 2000,
    }
    assert own_settings(run_config(HF_EXAMPLE), SPLIT) == added
    merged = deepspeed_settings(run_config(HF_EXAMPLE), SPLIT)
    assert merged["zero_optimization"] == {
        "stage": 2, "reduce_bucket_size": 50_000_000, "allgather_bucket_size": 200_000_000, "overlap_comm": False,
        "contiguous_gradients": True,
    }  # fmt: skip
    assert merged["train_batch_size"] == 64
    assert not {"fp16", "optimizer", "scheduler"} & set(merged)


def test_what_the_json_adds_is_the_same_on_other_ranks() -> None:
    """What a run folder keeps of it contradicts no later launch, and merging it again changes nothing."""
    added = own_settings(run_config(HF_EXAMPLE), SPLIT)
    other = BatchSplit(world_size=2, accumulation=1, rows_per_microbatch=32)
    assert own_settings(run_config(added), other) == added
    assert deepspeed_settings(run_config(added), SPLIT) == deepspeed_settings(run_config(HF_EXAMPLE), SPLIT)


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({"train_batch_size": 32}, "train_batch_size is 32, but the run has 64; set trainer.global_batch_size 32"),
        ({"gradient_clipping": 1.0}, "is 1.0, but the run has 0.0; set trainer.gradient_clipping 1.0"),
        ({"zero_optimization": {"stage": 3}}, "stage is 3, but the run has 2; set parallel.zero_stage 3"),
        ({"bf16": {"enabled": False}}, "but the run has true; set trainer.mixed_precision no"),
        ({"bfloat16": {"enabled": False}}, "bfloat16.enabled is false, but the run has true"),
        ({"fp16": {"enabled": True}}, "enc has no fp16; set it to false and use trainer.mixed_precision bf16"),
        ({"communication_data_type": "bf16"}, "set parallel.reduce_dtype bf16"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "set parallel.offload optimizer"),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "set parallel.offload parameters"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "enc offloads to the CPU only"),
        ({"zero_optimization": {"cpu_offload": True}}, "it is an old key: use parallel.offload"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type is \"Lamb\", but optimizer.name is adamw"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1}}}, "optimizer.lr is 0.0001; set optimizer.lr 1"),
        ({"optimizer": {"type": "AdamW", "params": {"amsgrad": True}}}, "params.amsgrad is nothing that the optimizer"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}}, "scheduler sets warmup_num_steps"),
        ({"zero_optimisation": {}}, "not a key of DeepSpeed; did you mean zero_optimization?"),
        ({"zero_optimization": {"overlap_com": True}}, "did you mean overlap_comm?"),
        ({"overlap_comm": True}, "did you mean zero_optimization.overlap_comm?"),
        ({"zero_optimization": {"overlap_comm": "yes"}}, "overlap_comm is \"yes\", must be true or false"),
        ({"zero_optimization": {"sub_group_size": 1.5}}, "sub_group_size is 1.5, must be a whole number"),
        ({"zero_optimization": 2}, "zero_optimization is 2, must be an object"),
        ({"gradient_allreduce_op": "sum"}, "but enc needs \"mean\"; remove it here"),
        ({"torch_autocast": {"enabled": True}}, "trainer.mixed_precision decides"),
        ({"activation_checkpointing": {"profile": True}}, "use trainer.gradient_checkpointing"),
        ({"bf16": {"check_grad_overflow": False}}, "bf16.check_grad_overflow is false, but enc needs true"),
        ({"bfloat16": {"check_grad_overflow": False}}, "bfloat16.check_grad_overflow is false, but enc needs true"),
        ({"data_types": {"param_dtype": "fp16"}}, "data_types.param_dtype is \"fp16\", but enc needs null"),
        ({"comet": {"enabled": True, "api_key": "X"}}, "comet has no place in a run of enc (enc logs by itself"),
        ({"comet": {"enabled": False, "api_key": "X"}}, "comet has no place in a run of enc (enc logs by itself"),
        ({"wandb": {"enabled": True}}, "use wandb.enabled of the run config"),
        ({"tensorboard": {"enabled": True}}, "tensorboard has no place in a run of enc (enc logs by itself"),
        ({"csv_monitor": {"enabled": True}}, "csv_monitor has no place in a run of enc (enc logs by itself"),
        ({"steps_per_print": 0}, "steps_per_print is 0, must be a whole number of at least 1"),
        ({"steps_per_print": "often"}, "steps_per_print is \"often\", must be a whole number of at least 1"),
        ({"vocabulary_size": "many"}, "vocabulary_size is \"many\", must be a whole number of at least 1"),
        ({"gradient_predivide_factor": 0}, "gradient_predivide_factor is 0, but enc needs 1.0"),
        ({"prescale_gradients": True}, "prescale_gradients is true, but enc needs false"),
        ({"zero_optimization": {"reduce_bucket_size": 0}}, "must be a whole number of at least 1"),
        ({"zero_optimization": {"allgather_bucket_size": 0}}, "must be a whole number of at least 1"),
        ({"zero_optimization": {"allgather_bucket_size": 1001}}, "is 1001, must be even with ZeRO 1 and 2"),
        ({"zero_optimization": {"sub_group_size": -1}}, "is -1, must be a whole number of at least 0"),
        ({"zero_optimization": {"zero_hpz_partition_size": 2}}, "is 2, but enc needs 1"),
        ({"zero_optimization": {"offload_optimizer": {"cpuadam_cores_perc": 2.0}}}, "is 2.0, must be from 0 to 1"),
        ({"log_level": "loud"}, "log_level is \"loud\", must be one of debug, info"),
        ({"comms_logger": {"enabled": True, "prof_ops": 3}}, "comms_logger.prof_ops is 3, must be a list"),
        ({"zero_optimization": {"zero_quantized_weights": True}}, "checkpoints need the weights as they are"),
        ({"zero_optimization": {"zero_quantized_gradients": True}}, "gradients are summed in parallel.reduce_dtype"),
        ({"zero_optimization": {"zero_quantized_nontrainable_weights": True}}, "checkpoints need the weights as they"),
        ({"amp": {"enabled": True, "opt_level": "O1"}}, "amp has no place in a run of enc (trainer.mixed_precision"),
        ({"elasticity": {"enabled": True}}, "elasticity has no place in a run of enc (a run of enc can be resumed on"),
        ({"sparse_gradients": True}, "sparse_gradients has no place in a run of enc (the gradients of enc's"),
        ({"zero_optimization": {"mics_shard_size": 4}}, "use parallel.engine fsdp with parallel.replicate"),
        ({"communication_data_type": "fp16"}, "the run has \"fp32\"; parallel.reduce_dtype cannot be fp16, so remove"),
        ({"zero_optimization": {"stage": 5}}, "parallel.zero_stage cannot be 5, so remove it here"),
        ({"train_batch_size": 0}, "trainer.global_batch_size cannot be 0, so remove it here"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.98]}}}, "set optimizer.betas [0.9, 0.98]"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_contradicts_the_run_is_refused(own: dict, says: str) -> None:
    """With both values and the key to change."""
    with pytest.raises(UsageError) as error:
        deepspeed_settings(run_config(own), SPLIT)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_every_key_that_deepspeed_had_is_refused_with_a_reason() -> None:
    """None is called unknown; switched off it is accepted and leaves no trace, since DeepSpeed stops at its name."""
    code = "from deepspeed.runtime import config as c\nprint(*c._REMOVED_TOP_LEVEL_CONFIG_KEYS)\n"
    code += "print(*c._REMOVED_ZERO_CONFIG_KEYS)"
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True, env=environment
    )
    top, zero = (line.split() for line in done.stdout.splitlines()[-2:])
    for key in [*top, *(f"zero_optimization.{name}" for name in zero)]:
        section, _, name = key.rpartition(".")
        for on, off in (({"enabled": True}, {"enabled": False}), (True, False)):
            with pytest.raises(UsageError, match=rf"{key} has no place in a run of enc \(.+\); remove it"):
                own_settings(run_config({section: {name: on}} if section else {name: on}), SPLIT)
            assert own_settings(run_config({section: {name: off}} if section else {name: off}), SPLIT) == {}


def test_the_old_name_of_bf16_is_read_as_the_present_one() -> None:
    """DeepSpeed ignores `bfloat16` beside `bf16`, which the rendered settings have."""
    own = {"bfloat16": {"enabled": True, "immediate_grad_update": True}}
    assert own_settings(run_config(own), SPLIT) == {"bf16": {"immediate_grad_update": True}}
    assert deepspeed_settings(run_config(own), SPLIT)["bf16"] == {"enabled": True, "immediate_grad_update": True}


def test_bf16_weights_need_a_sharded_optimizer() -> None:
    """ZeRO 0 trains fp32 weights under autocast, so `bf16.enabled` is a contradiction there."""
    assert "bf16" not in deepspeed_settings(run_config(zero_stage=0), SPLIT)
    with pytest.raises(UsageError, match=r"ZeRO 0 keeps fp32 weights under autocast; set parallel\.zero_stage 1"):
        deepspeed_settings(run_config({"bf16": {"enabled": True}}, zero_stage=0), SPLIT)


def test_all_problems_of_a_file_are_reported_together(tmp_path: Path) -> None:
    """With their lines, a key given twice among them; tabs are fine."""
    path = tmp_path / "ds.json"
    path.write_text(
        '{\n\t"train_batch_size": 32,\n\t"zero_optimization": {\n\t\t"stag": 2\n\t},\n"train_batch_size": 32}'
    )
    with pytest.raises(UsageError) as error:
        deepspeed_settings(run_config(str(path)), SPLIT)
    text = str(error.value)
    assert "has 3 problems" in text
    assert f"{path}:2: train_batch_size is 32, but the run has 64" in text
    assert f"{path}:4: zero_optimization.stag is not a key of DeepSpeed; did you mean stage?" in text
    assert f"{path}:6: train_batch_size is given twice, first at {path}:2" in text


# --- read by the ranks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["deepspeed", "fsdp"])
def test_ranks_read_what_was_rendered(engine: str, tmp_path: Path) -> None:
    config = run_config(engine=engine)
    for name, text in engine_files(config, SPLIT).items():
        (tmp_path / name).write_text(text)
    told = deepspeed_settings(config, SPLIT) if engine == "deepspeed" else fsdp_settings(config, SPLIT)
    assert read_settings(tmp_path, config, SPLIT) == told


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read: No such file or directory"),
        ("{,}", "is not valid JSON"),
        ("[]", "are an object"),
        ("{}", "lacks gradient_accumulation_steps, gradient_clipping, train_batch_size"),
        ({"train_batch_size": 32}, "train_batch_size is 32, but this run has 64"),
    ],
)
def test_a_file_that_ranks_cannot_use_is_refused(content: Any, says: str, tmp_path: Path) -> None:
    """The message names the file and how to get a good one."""
    config = run_config()
    if isinstance(content, dict):
        content = json.dumps(deepspeed_settings(config, SPLIT) | content)
    if content is not None:
        (tmp_path / "ds_config.json").write_text(content)
    with pytest.raises(UsageError) as error:
        read_settings(tmp_path, config, SPLIT)
    assert f"{tmp_path}/ds_config.json" in str(error.value)
    assert says in str(error.value)
    assert str(error.value).endswith("`enc launch` and `enc resume` write it anew.")
