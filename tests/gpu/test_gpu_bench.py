"""`enc bench` on a GPU: every side of every kernel at a small shape, and a short comparison of steps."""

import json

import pytest
from running import Enc

from enc.tools.bench.operations import OPERATIONS

SMALL = {
    "masked_ce": ["tokens=2560,masked=0.2,hidden=256,vocab=4096"],
    "varlen_attention": [f"tokens=4096,length=500,heads=4,head_dim=64,buckets={number}" for number in (0, 32)],
    "norms": ["tokens=4096,hidden=512"],
    "add_norms": ["tokens=4096,hidden=512"],
    "swiglu": ["tokens=4096,hidden=512"],
    "rope": ["tokens=4096,heads=8,head_dim=64"],
}


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_every_side_runs_and_agrees_or_says_why(enc: Enc, name: str) -> None:
    """enc's side runs in both dtypes and is right; times, memory and shares of the peak make sense."""
    shapes = [word for shape in SMALL[name] for word in ("--shape", shape)]
    report = json.loads(enc("bench", "kernels", name, *shapes, "--rounds", "3", "--json").stdout)
    assert report["device"] == "cuda"
    assert report["machine"]["gpu"]["clocks"]
    peaks = report["roofline"]
    assert peaks["bf16"]["flops"] > 2 * peaks["fp32"]["flops"]
    for result in report["results"]:
        ours = result["sides"]["enc"]
        assert not ours["wrong"], result
        for side in result["sides"].values():
            assert ("why_not" in side) != ("seconds" in side)
            if "seconds" in side:
                assert 0 < side["roofline_fraction"] < 3  # what a small shape writes may stay in the L2 cache
                assert side["extra_bytes"] >= 0


def test_steps_are_compared(enc: Enc) -> None:
    """A small model, enc against Trainer on full rows: peak memory, MFU below 1, the split adds up to the step."""
    small = ["model.hidden_size=256", "model.num_hidden_layers=4", "model.num_attention_heads=4",
             "model.intermediate_size=1024", "trainer.per_device_train_batch_size=8"]  # fmt: skip
    words = ["--against", "full", "--rounds", "2", "--minutes", "0", "--steps", "4", "--vocab-size", "4096", "--json"]
    report = json.loads(enc("bench", "step", *words, *small).stdout)
    sides = report["results"]["bf16"]
    for side in sides.values():
        assert 0 < side["mfu"]["median"] < 1
        assert side["peak_bytes"] > 1e7
    block = sides["enc"]["blocks"][-1]
    assert 0.5 < sum(block["parts"].values()) * block["steps"] / block["seconds"] < 1.1


def test_profile_is_of_the_gpu(enc: Enc) -> None:
    small = ["model.hidden_size=256", "model.num_hidden_layers=4", "model.num_attention_heads=4"]
    report = json.loads(enc("bench", "step", *small, "--profile", "--steps", "2", "--json").stdout)
    shares = {kind: found["share"] for kind, found in report["results"]["bf16"]["kinds"].items()}
    assert shares["matrix products"] > 0.05
    assert shares["attention"] > 0.01
