"""Schedules and optimizer groups."""

import itertools
import math

import pytest
import torch

from enc.encoder.models.mpnet.config import MpnetConfig
from enc.encoder.models.mpnet.model import MpnetForMaskedLM
from enc.encoder.models.neobert.config import NeoBertConfig
from enc.encoder.models.registry import parameters_of
from enc.encoder.optim.config import OptimizerConfig, SchedulerConfig
from enc.encoder.optim.make import make_optimizer
from enc.encoder.optim.schedule import make_schedule

NEOBERT = NeoBertConfig(
    rope=False, rms_norm=False, tie_word_embeddings=False, hidden_size=48, num_attention_heads=4, num_hidden_layers=1
)


def rates(max_steps: int, **settings) -> list[float]:
    schedule = make_schedule(SchedulerConfig(**settings), max_steps)
    return [schedule(step) for step in range(max_steps + 5)]


def test_cosine_is_neoberts_sequence() -> None:
    """The learning rates that NeoBERT logged for lr 1e-3, warmup 5, 20 steps (it logs the rate of the next update)."""
    logged = [0.00020008, 0.00040006, 0.00060004, 0.00080002, 0.001, 0.000990166, 0.000961095, 0.000914058, 0.000851109,
              0.000775, 0.000689058, 0.000597038, 0.000502962]  # fmt: skip
    ours = [1e-3 * rate for rate in rates(20, warmup_steps=5)[1 : 1 + len(logged)]]
    assert ours == pytest.approx(logged, rel=1e-6)


@pytest.mark.parametrize("name", ["cosine", "linear", "polynomial"])
def test_decay_ends_at_the_final_ratio_and_stays(name: str) -> None:
    values = rates(100, name=name, warmup_steps=10, final_lr_ratio=0.1, decay_steps=80, power=2.0)
    assert values[0] == pytest.approx(1e-4)
    assert values[10] == 1.0
    assert values[80:] == pytest.approx([0.1] * 25)
    assert all(a >= b for a, b in itertools.pairwise(values[10:]))


def test_shapes_at_half_way() -> None:
    """Half of the decay: cosine and linear 0.5, quadratic 0.25 (to zero)."""
    common = {"warmup_steps": 0, "final_lr_ratio": 0.0}
    assert rates(100, name="cosine", **common)[50] == pytest.approx(0.5)
    assert rates(100, name="linear", **common)[50] == pytest.approx(0.5)
    assert rates(100, name="polynomial", power=2.0, **common)[50] == pytest.approx(0.25)
    assert rates(100, name="cosine", **common)[25] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_warmup_stable_decay_has_three_phases() -> None:
    values = rates(100, name="warmup_stable_decay", warmup_steps=10, decay_percent=20.0, final_lr_ratio=0.0)
    assert values[10:81] == [1.0] * 71
    assert values[90] == pytest.approx(0.5)
    assert values[100:] == [0.0] * 5
    by_steps = rates(100, name="warmup_stable_decay", warmup_steps=10, decay_steps=20, final_lr_ratio=0.0)
    assert by_steps == values


def test_percentages_win_over_steps_and_refer_to_the_total() -> None:
    values = rates(100, warmup_steps=3, warmup_percent=10.0, total_steps=200, decay_percent=50.0, final_lr_ratio=0.1)
    assert values[20] == 1.0
    assert values[100] == pytest.approx(0.1)


def test_warmup_longer_than_the_run() -> None:
    """The default warmup of 10000 steps in a run of 20 just rises."""
    values = rates(20, name="cosine", warmup_steps=10000)
    assert all(a < b for a, b in itertools.pairwise(values))


def test_constant_after_warmup() -> None:
    assert rates(50, name="constant", warmup_steps=5)[5:] == [1.0] * 50


@pytest.mark.parametrize(
    ("settings", "total", "expected"),
    [
        ({"warmup_steps": 2}, 4, [0.5, 1, 0.5, 0]),
        ({"warmup_steps": 0}, 4, [1, 2 / 3, 1 / 3, 0]),
        ({"warmup_steps": 2, "power": 2.0}, 6, [0.5, 1, 9 / 16, 4 / 16, 1 / 16, 0]),
        ({"warmup_steps": 1, "final_lr_ratio": 0.1}, 4, [1, 0.7, 0.4, 0.1]),
        ({"warmup_steps": 4}, 4, [0.25, 0.5, 0.75, 1]),
        ({"warmup_steps": 0}, 1, [1]),
        ({"warmup_percent": 10}, 20, [0.5, 1, *(1 - k / 18 for k in range(1, 19))]),
    ],
)
def test_polynomial_decay_counts_from_one(settings: dict, total: int, expected: list[float]) -> None:
    """fairseq's and annotated-mpnet's rates: n / W, then (1 - k / K)^power down to the end value in the last update."""
    values = rates(total, name="polynomial_decay", **({"final_lr_ratio": 0.0} | settings))
    assert values[:total] == pytest.approx(expected)
    if total > 1 and settings.get("warmup_steps") != total:
        assert values[total:] == pytest.approx([settings.get("final_lr_ratio", 0.0)] * 5)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.transformer_encoder.0.qkv.weight", (12, 4), True),
        ("decoder.weight", (16, 4), True),
        ("model.encoder.weight", (16, 4), False),
        ("model.positional_embedding.weight", (16, 4), False),
        ("model.transformer_encoder.0.attention_norm.weight", (4,), False),
        ("model.layer_norm.bias", (4,), False),
    ],
)
def test_decay_groups(name: str, shape: tuple[int, ...], expected: bool) -> None:
    parameter = torch.nn.Parameter(torch.zeros(shape))
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.5), parameters_of(NEOBERT), {name: parameter})
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5 if expected else 0.0]


def test_decay_groups_of_an_mpnet() -> None:
    """With `decay_embeddings` all but biases and norms decay, as in annotated-mpnet; without, no embedding does."""
    config = MpnetConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=128)
    named = dict(MpnetForMaskedLM(config, 100).named_parameters())
    vectors = {name for name, p in named.items() if p.ndim == 1}
    decayed = {}
    for asked in (False, True):
        optimizer = make_optimizer(OptimizerConfig(decay_embeddings=asked), parameters_of(config), named)
        of_group = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
        decayed[asked] = {name for name, p in named.items() if id(p) in of_group}
    assert named.keys() - decayed[True] == vectors
    embeddings = decayed[True] - decayed[False]
    assert {name.split(".")[-2] for name in embeddings} == {
        "word_embeddings",
        "position_embeddings",
        "relative_attention_bias",
    }


def test_adamw_equals_the_formula() -> None:
    """Three updates of one matrix against AdamW written out in fp64."""
    start = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parameter = torch.nn.Parameter(start.float())
    config = OptimizerConfig(lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    optimizer = make_optimizer(config, parameters_of(NEOBERT), {"decoder.weight": parameter})
    weight, m, v = start.float().double(), torch.zeros_like(start), torch.zeros_like(start)
    for step in range(1, 4):
        gradient = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        parameter.grad = gradient.float()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient**2
        update = (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
        weight = weight * (1 - 1e-2 * 0.1) - 1e-2 * update
    torch.testing.assert_close(parameter.detach().double(), weight, rtol=1e-5, atol=1e-6)


def test_adam_puts_decay_into_the_gradient() -> None:
    """`adam` decays every parameter as L2, so a norm's weight moves without a gradient."""
    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = make_optimizer(
        OptimizerConfig(name="adam", weight_decay=0.5), parameters_of(NEOBERT), {"model.layer_norm.weight": parameter}
    )
    parameter.grad = torch.zeros(4)
    optimizer.step()
    assert (parameter < 1).all()
