"""Every engine on one GPU: the numbers of the CPU, exact resumes, the memory that was computed."""

import json

import pytest
from cluster import SAVED, STEPS, Cluster

ON_GPU = ["trainer.use_cpu=false", "trainer.tf32=false"]
BATCH = ["trainer.global_batch_size=24", "trainer.per_device_train_batch_size=6", "trainer.mixed_precision='no'"]
ENGINES = {
    "ddp": ["parallel.engine=ddp"],
    "fsdp": ["parallel.engine=fsdp"],
    "fsdp-offload": ["parallel.engine=fsdp", "parallel.offload=parameters"],
    **{f"zero{stage}": ["parallel.engine=deepspeed", f"parallel.zero_stage={stage}"] for stage in range(4)},
    "zero2-offload": ["parallel.engine=deepspeed", "parallel.zero_stage=2", "parallel.offload=optimizer"],
    "zero3-offload": ["parallel.engine=deepspeed", "parallel.zero_stage=3", "parallel.offload=parameters"],
}
# (width, layers, rows): the state weighs most, the activations weigh most, something between.
SIZES = {"wide": (1536, 12, 1), "long": (512, 8, 64), "base": (768, 12, 16)}


@pytest.fixture(scope="module")
def trained(gpu: Cluster) -> Cluster:
    """Each engine, and once more from the checkpoint in the middle."""
    gpu.train(1, [gpu.prepare("cpu", 1, *BATCH)])
    gpu.train(1, [gpu.prepare(name, 1, *BATCH, *ON_GPU, *words) for name, words in ENGINES.items()])
    resumed = [
        gpu.prepare(f"{name}-resumed", 1, *BATCH, *ON_GPU, *words, goes_on=(name, SAVED))
        for name, words in ENGINES.items()
    ]
    gpu.train(1, resumed)
    return gpu


@pytest.mark.parametrize("engine", ENGINES)
def test_the_gpu_computes_what_the_cpu_does(trained: Cluster, engine: str) -> None:
    """In fp32 without TF32: losses within 1e-4 of the CPU, gradient norms within 1e-3."""
    found, expected = trained.records(engine), trained.records("cpu")
    for step in range(1, 21):
        assert found[step]["num_labels"] == expected[step]["num_labels"]
        assert found[step]["loss"] == pytest.approx(expected[step]["loss"], rel=1e-4)
        assert found[step]["grad_norm"] == pytest.approx(expected[step]["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_resumed_run_repeats_every_bit(trained: Cluster, engine: str) -> None:
    whole, resumed = trained.records(engine), trained.records(f"{engine}-resumed")
    for step in range(11, 21):
        for key in ("loss", "grad_norm"):
            assert resumed[step][key] == whole[step][key], (step, key)
    assert trained.weights(f"{engine}-resumed", STEPS) == trained.weights(engine, STEPS)


@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero2", "zero3"])
@pytest.mark.parametrize("size", SIZES)
def test_peak_memory_is_what_was_computed(gpu: Cluster, size: str, engine: str) -> None:
    """To 10 %, the most memory that is allocated during three steps in bf16."""
    width, layers, rows = SIZES[size]
    run = gpu.prepare(
        f"peak-{size}-{engine}", 1, *ON_GPU, *ENGINES[engine], f"model.hidden_size={width}",
        f"model.intermediate_size={4 * width}", f"model.num_hidden_layers={layers}", "model.num_attention_heads=8",
        f"trainer.per_device_train_batch_size={rows}", f"trainer.global_batch_size={rows}",
        "trainer.mixed_precision=bf16", "datacollator.max_length=512", "dataset.max_seq_length=512",
        "model.max_position_embeddings=512", "parallel.bucket_size=10000000",
    )  # fmt: skip
    gpu.act("measure_peak", 1, [run])
    found = json.loads((run / "bytes.json").read_text())
    print(f"{size}, {engine}: peak {found['peak']:,} bytes, {found['computed']:,} computed")
    assert found["computed"] == pytest.approx(found["peak"], rel=0.1)
