"""Every engine trains the same model: real gloo ranks, real DeepSpeed, real FSDP."""

import json
from itertools import product
from typing import Any

import pytest
from cluster import SAVED, STEPS, UNEVEN, Cluster

ENGINES = {
    "ddp": ["parallel.engine=ddp"],
    "fsdp": ["parallel.engine=fsdp"],
    "hybrid": ["parallel.engine=fsdp", "parallel.replicate=2"],
    "fsdp-offload": ["parallel.engine=fsdp", "parallel.offload=parameters", "parallel.reshard_after_forward=false"],
    **{f"zero{stage}": ["parallel.engine=deepspeed", f"parallel.zero_stage={stage}"] for stage in range(4)},
    "zero2-offload": ["parallel.engine=deepspeed", "parallel.zero_stage=2", "parallel.offload=optimizer"],
    "zero3-offload": ["parallel.engine=deepspeed", "parallel.zero_stage=3", "parallel.offload=parameters"],
    # Gradients summed over ranks in bf16.
    "fsdp-reduced": ["parallel.engine=fsdp", "parallel.reduce_dtype=bf16"],
    "zero3-reduced": ["parallel.engine=deepspeed", "parallel.zero_stage=3", "parallel.reduce_dtype=bf16"],
}
BATCHES = {
    "plain": ["trainer.global_batch_size=12", "trainer.per_device_train_batch_size=12",
              "trainer.gradient_clipping=null"],
    # Four microbatches a step on two ranks; the norms are about 2, so that clipping is active.
    "accumulated": ["trainer.global_batch_size=24", "trainer.per_device_train_batch_size=3",
                    "trainer.gradient_clipping=1.0"],
}  # fmt: skip
PRECISIONS = {"fp32": "trainer.mixed_precision='no'", "bf16": "trainer.mixed_precision=bf16"}
ON_TWO = [name for name in ENGINES if name != "hybrid" and not name.endswith("-reduced")]
VARIANTS = [("plain", "fp32"), ("plain", "bf16"), ("accumulated", "fp32"), ("accumulated", "bf16")]
CASES = [
    *((name, 2, *variant) for name in ON_TWO for variant in VARIANTS),
    *(("hybrid", 4, *variant) for variant in VARIANTS),
    *((name, 2, "accumulated", "bf16") for name in ENGINES if name.endswith("-reduced")),
]
SAVED_BY = [("ddp", 1), ("fsdp", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2)]
# Every engine in the hardest variant, every variant with an engine of each family, and what others go on from.
EVERY_TIME = [
    *(case for case in CASES if case[2:] == ("accumulated", "bf16")),
    *((name, 2, *variant) for name in ("ddp", "fsdp") for variant in VARIANTS[:3]),
    ("zero0", 2, "plain", "fp32"), ("zero2", 2, "plain", "bf16"),
    *((name, 2, "accumulated", "fp32") for name in ("zero1", "zero2", "zero3")),
]  # fmt: skip
# (loss, gradient norm): rounding in fp32; in bf16 a weight or activation is off by up to 2^-9 of itself.
TOLERANCES = {"fp32": (1e-5, 1e-5), "bf16": (1e-3, 1e-2)}


def options(engine: str, batch: str, precision: str) -> list[str]:
    return [*ENGINES[engine], *BATCHES[batch], PRECISIONS[precision]]


def run_name(engine: str, ranks: int, batch: str = "accumulated", precision: str = "fp32") -> str:
    return f"{engine}x{ranks}-{batch}-{precision}"


def slow_unless(every_time: bool, *values: object) -> Any:
    return pytest.param(*values, marks=[] if every_time else [pytest.mark.slow])


def selected(request: pytest.FixtureRequest, test: str, *names: str) -> list[tuple]:
    """Return the parameters of the cases of a test that were selected."""
    items = [item for item in request.session.items if getattr(item, "originalname", "") == test]
    return [tuple(item.callspec.params[name] for name in names) for item in items if item.path == request.path]


@pytest.fixture(scope="module")
def trained(cluster: Cluster, request: pytest.FixtureRequest) -> Cluster:
    """Each case, with a checkpoint in the middle, beside those of one process."""
    test = test_losses_and_norms_are_those_of_one_process.__name__
    found = selected(request, test, "engine", "ranks", "batch", "precision")
    saved = [(*source, "accumulated", "fp32") for source in SAVED_BY]
    alone = [("ddp", 1, *variant) for variant in VARIANTS]
    wanted = list(dict.fromkeys([*alone, *saved, *found]))
    for ranks in (1, 2, 4):
        cases = [case for case in wanted if case[1] == ranks]
        cluster.train(ranks, [cluster.prepare(run_name(*case), ranks, *options(case[0], *case[2:])) for case in cases])
    return cluster


def differences(cluster: Cluster, found: str, expected: str, first_step: int = 1) -> tuple[float, float]:
    """Return the largest relative differences of loss and gradient norm; counts must be equal."""
    ours, theirs = cluster.records(found), cluster.records(expected)
    steps = range(first_step, STEPS + 1)
    for step in steps:
        for key in ("num_labels", "tokens", "learning_rate"):
            assert ours[step][key] == theirs[step][key], (step, key)
    loss, norm = (max(abs(ours[step][key] / theirs[step][key] - 1) for step in steps) for key in ("loss", "grad_norm"))
    return loss, norm


@pytest.mark.parametrize(
    ("engine", "ranks", "batch", "precision"), [slow_unless(case in EVERY_TIME, *case) for case in CASES]
)
def test_losses_and_norms_are_those_of_one_process(
    trained: Cluster, engine: str, ranks: int, batch: str, precision: str
) -> None:
    """In fp32 within 1e-5 of plain training on one process, in bf16 within its rounding."""
    found, expected = run_name(engine, ranks, batch, precision), run_name("ddp", 1, batch, precision)
    loss, norm = differences(trained, found, expected)
    allowed = TOLERANCES[precision]
    print(f"{found}: loss {loss:.1e}, gradient norm {norm:.1e}")
    assert loss < allowed[0]
    assert norm < allowed[1]


MPNET = ["model.type=mpnet", "datacollator.whole_word=true", "optimizer.decay_embeddings=true",
         *(f"model.{name}dropout_prob=0.0" for name in ("", "attention_", "activation_"))]  # fmt: skip
MPNET_ON = [("ddp", 2), ("fsdp", 2), ("zero2", 2), ("ddp", 4)]


@pytest.fixture(scope="module")
def mpnets(cluster: Cluster) -> Cluster:
    """Masked and permuted training of an MPNet with each engine."""
    for ranks in (1, 2, 4):
        cases = [(engine, on) for engine, on in [("ddp", 1), *MPNET_ON] if on == ranks]
        cluster.train(ranks, [
            cluster.prepare(f"mpnet-{engine}x{on}", on, *options(engine, "accumulated", "fp32"), *MPNET)
            for engine, on in cases
        ])  # fmt: skip
    return cluster


@pytest.mark.parametrize(("engine", "ranks"), MPNET_ON)
def test_mpnet_is_the_same_under_every_engine(mpnets: Cluster, engine: str, ranks: int) -> None:
    """The same rows and permutations on 1, 2 and 4 ranks: counts equal, losses and gradient norms within 1e-5."""
    loss, norm = differences(mpnets, f"mpnet-{engine}x{ranks}", "mpnet-ddpx1")
    assert max(loss, norm) < 1e-5


def test_engines_keep_their_contract(cluster: Cluster) -> None:
    """A NaN on one rank skips the update; named state goes out and in; norms are those of the whole model."""
    adam = ["optimizer.name=adam", "optimizer.weight_decay=0.1"]  # whose weight decay goes through the moments
    cases = {
        2: {name: [] for name in ON_TWO} | {f"{name} with adam": adam for name in ("fsdp", "zero1", "zero3")},
        3: {name: [] for name in ("fsdp", "zero2", "zero3")},  # no tensor divides by three
    }
    for ranks, wanted in cases.items():
        runs = [
            cluster.prepare(f"contract-{ranks}-{case}", ranks, *options(case.split()[0], "plain", "fp32"), *words)
            for case, words in wanted.items()
        ]
        cluster.act("check_contract", ranks, runs)


def test_engines_go_by_what_the_optimizer_keeps(cluster: Cluster) -> None:
    """One tensor for a matrix, two and a count for the rest: named state, memory and updates are right with these."""
    runs = [
        cluster.prepare(f"mixed-{name}", 2, *options(name, "plain", "fp32"), *UNEVEN, "optimizer.name=adam")
        for name in ON_TWO
    ]
    cluster.act("check_another_optimizer", 2, runs)
    found = {run.name: json.loads((run / "bytes.json").read_text()) for run in runs}
    wrong = {name: c for name, c in found.items() if c["computed"] != pytest.approx(c["held"], rel=0.01)}
    assert not wrong


# (engine that saved, engine that goes on): each of five goes on from itself and from one of another kind.
PAIRS = list(product(range(len(SAVED_BY)), repeat=2))
LATIN = [(source, target) for source, target in PAIRS if (target - source) % len(SAVED_BY) in (0, 2)]


@pytest.fixture(scope="module")
def resumed(trained: Cluster, request: pytest.FixtureRequest) -> Cluster:
    """An engine goes on from the middle of each engine of its pairs."""
    test = test_an_engine_goes_on_from_every_other_ones_checkpoint.__name__
    pairs = selected(request, test, "source", "engine", "ranks")
    for ranks in (1, 2):
        runs = [
            trained.prepare(
                f"{run_name(engine, ranks)}-from-{run_name(*source)}", ranks,
                *options(engine, "accumulated", "fp32"), goes_on=(run_name(*source), SAVED),
            )
            for source, engine, on in pairs
            if on == ranks
        ]  # fmt: skip
        trained.train(ranks, runs)
    return trained


@pytest.mark.parametrize(
    ("source", "engine", "ranks"),
    [
        pytest.param(
            SAVED_BY[source], *SAVED_BY[target], marks=[] if (source, target) in LATIN else [pytest.mark.slow],
            id="{}x{}-from-{}x{}".format(*SAVED_BY[target], *SAVED_BY[source]),
        )
        for source, target in PAIRS
    ],
)  # fmt: skip
def test_an_engine_goes_on_from_every_other_ones_checkpoint(
    resumed: Cluster, source: tuple[str, int], engine: str, ranks: int
) -> None:
    """The other half within 1e-5 of the uninterrupted run; the same bits on the same engine and ranks."""
    name = f"{run_name(engine, ranks)}-from-{run_name(*source)}"
    loss, norm = differences(resumed, name, run_name("ddp", 1), first_step=SAVED + 1)
    assert max(loss, norm) < 1e-5
    if source == (engine, ranks):
        whole = run_name(engine, ranks)
        assert differences(resumed, name, whole, first_step=SAVED + 1) == (0.0, 0.0)
        assert resumed.weights(name, STEPS) == resumed.weights(whole, STEPS)


def test_two_then_three_then_one_ranks(trained: Cluster) -> None:
    """FSDP on two ranks, ZeRO-3 on three (where no tensor divides evenly), then one process."""
    chain = [("fsdp", 2, None), ("zero3", 3, ("chain-2", 4)), ("ddp", 1, ("chain-3", 8))]
    for engine, ranks, source in chain:
        run = trained.prepare(
            f"chain-{ranks}", ranks, *options(engine, "accumulated", "fp32"), "trainer.save_steps=4", goes_on=source
        )
        trained.train(ranks, [run])
    loss, norm = differences(trained, "chain-1", run_name("ddp", 1))
    assert max(loss, norm) < 1e-5
