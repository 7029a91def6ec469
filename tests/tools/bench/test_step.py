"""The benchmark of the training step: that it compares like with like. Its figures are not tested, their sums are."""

import json
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from running import Enc

from enc.encoder.errors import UsageError
from enc.tools.bench.step import ask, joined, measure, summary
from enc.tools.bench.step_profile import KINDS, kind_of
from enc.tools.bench.step_sides import Block

ROWS, ROW_LENGTH = 4, 64


@pytest.fixture(scope="module")
def command(store: Path, environment: dict[str, str]) -> list[str]:
    """Return words that run the benchmark on a tiny model for a second."""
    small = ["--layers", "2", "--width", "64", "--heads", "2", "--rows", str(ROWS), "--row-length", str(ROW_LENGTH)]
    short = ["--min-rounds", "2", "--minutes", "0", "--steps", "2", "--store", str(store)]
    return [sys.executable, "-m", "enc.tools.bench.step", *small, *short]


def _output(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_sides_train_on_the_same_number_of_useful_tokens(command: list[str], environment: dict[str, str]) -> None:
    """Every side's step has about enc's useful tokens, only the padded ones waste places, and models weigh the same."""
    report = json.loads(_output([*command, "--json", "--dtype", "fp32"], environment))
    sides = report["results"]["fp32"]
    full = ROWS * ROW_LENGTH
    assert sides["full"]["fill"] == 1
    assert sides["full"]["tokens_per_step"] == full
    assert 0.97 * full <= sides["enc"]["tokens_per_step"] <= full
    assert sides["natural"]["fill"] < 0.9
    assert sides["natural"]["tokens_per_step"] == pytest.approx(full, rel=0.5)  # a few short documents
    assert report["model"]["hf_parameters"] == pytest.approx(report["model"]["enc_parameters"], rel=0.1)
    for side in sides.values():
        assert [block["steps"] for block in side["blocks"]] == [2, 2]
        assert side["peak_bytes"] is None  # of a GPU


def test_mfu_and_the_split_of_a_step_follow_from_the_blocks(command: list[str], environment: dict[str, str]) -> None:
    """Operations are those of the useful tokens; enc's four parts make up its step; ratios follow from the rates."""
    report = json.loads(_output([*command, "--json", "--dtype", "fp32", "--sides", "full"], environment))
    sides, model = report["results"]["fp32"], report["model"]
    block_parameters = model["layers"] * (4 * model["width"] ** 2 + 3 * model["width"] * model["feed_forward"])
    head = 6 * model["width"] * model["vocabulary"]
    for block in sides["full"]["blocks"]:
        attention = 12 * model["layers"] * model["width"] * ROW_LENGTH * block["tokens"]  # over the whole row
        labels = (block["flops"] - 6 * block_parameters * block["tokens"] - attention) / head
        assert labels == pytest.approx(0.2 * block["tokens"], rel=0.4)  # Trainer draws each token by itself
    for block in sides["enc"]["blocks"]:
        assert 3 * block_parameters < block["flops"] / block["tokens"] < sides["full"]["blocks"][0]["flops"]
        assert 0.5 < sum(block["parts"].values()) * block["steps"] / block["seconds"] <= 1
    rates = [[b["tokens"] / b["seconds"] for b in sides[name]["blocks"]] for name in ("enc", "full")]
    assert sides["full"]["tokens_per_s"]["median"] == pytest.approx(statistics.median(rates[1]))
    ratios = [ours / theirs for ours, theirs in zip(*rates, strict=True)]
    assert sides["full"]["enc_is_times"]["median"] == pytest.approx(statistics.median(ratios))
    assert all(side["mfu"]["median"] > 0 for side in sides.values())


def test_table_fits_80_columns(command: list[str], environment: dict[str, str]) -> None:
    """The table names the machine, the versions and each side, within 80 columns."""
    lines = _output([*command, "--dtype", "bf16", "--sides", "full"], environment).splitlines()
    assert max(map(len, lines)) <= 80
    assert "cores" in lines[0]
    assert "transformers" in lines[1]
    assert [line.split()[:2] for line in lines[-2:]] == [["bf16", "enc,"], ["bf16", "Trainer,"]]
    assert " x (" in lines[-1]


def test_profile_names_every_kind(command: list[str], environment: dict[str, str]) -> None:
    """Shares add up to the step, and a model without attention or products would not train."""
    report = json.loads(_output([*command, "--json", "--dtype", "fp32", "--profile"], environment))
    shares = {kind: found["share"] for kind, found in report["results"]["fp32"]["kinds"].items()}
    assert sum(shares.values()) == pytest.approx(1)
    assert all(shares[kind] > 0 for kind in KINDS)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::addmm", "matrix products"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_nt_n", "matrix products"),
        ("flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "attention"),
        ("enc::varlen_attention", "attention"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::bfloat16_copy_kernel>", "casts and copies"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::AddFunctor>", "elementwise"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("aten::_fused_adamw_", "optimizer"),
        ("ncclDevKernel_AllReduce", "other"),
    ],
)
def test_kinds_of_operations(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_a_side_that_fails_is_left_out_with_its_reason() -> None:
    """In a later round as well as in the first one; the others go on."""

    def side(round_: int, steps: int, fails_in: int | None = None) -> Block:
        if round_ == fails_in:
            raise RuntimeError("out of memory\nand more")
        return Block(10, 20, steps, 1.0, 1.0, 100)

    sides = {"enc": side, "full": partial(side, fails_in=0), "natural": partial(side, fails_in=2)}
    said: list[str] = []
    blocks, why_not = measure(sides, 1, 0.0, 3, "wall", said.append)
    assert {name: len(runs) for name, runs in blocks.items()} == {"enc": 3}
    assert why_not == {name: "RuntimeError: out of memory" for name in ("full", "natural")}
    assert "Trainer, full rows: RuntimeError: out of memory" in said
    found = summary(blocks, "wall", 1000.0)
    assert found["enc"]["mfu"]["median"] == 0.1


def test_documents_have_the_lengths_of_web_text() -> None:
    """Log-normal: the median as asked for, the mean well above it, the same each time."""
    texts = ["x" * 300] * 20_000
    lengths = [len(text) / 4 for text in joined(texts, 400)]
    assert 350 < statistics.median(lengths) < 500
    assert 1.3 < statistics.fmean(lengths) / statistics.median(lengths) < 2
    assert lengths == [len(text) / 4 for text in joined(texts, 400)]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"against": ["fulll"]}, "--against fulll is not known; did you mean full?"),
        ({"dtypes": ["fp16"]}, "--dtype fp16 is not known"),
        ({"store": Path("nowhere")}, "nowhere"),
        ({"config": "neobert-250"}, "neobert-250m"),
        ({"overrides": {"model.hiden_size": 8}}, "did you mean model.hidden_size?"),
    ],
)
def test_a_mistake_is_found_before_anything_runs(given: dict, said: str) -> None:
    with pytest.raises(UsageError) as raised:
        ask("cpu", **{"overrides": {}, **given})
    assert said in str(raised.value)


def test_the_command_takes_a_config_and_its_keys(enc: Enc, store: Path) -> None:
    """`enc bench step CFG key=value` trains what the config says, and writes the page."""
    words = ["--device", "cpu", "--dtype", "fp32", "--against", "", "--rounds", "1", "--minutes", "0", "--steps", "1"]
    done = enc("bench", "step", "smoke", *words, "--store", str(store), "--to", "step.md", "model.num_hidden_layers=1")
    assert "\n1 x " in done.stdout
    assert (enc.folder / "step.md").read_text().startswith("# The training step on a CPU\n")
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.slow
def test_cost_of_saves(environment: dict[str, str]) -> None:
    """The bench of saves runs a real launch and accounts for every part of a checkpoint's cost."""
    small = ["hidden_size=64", "num_hidden_layers=2", "num_attention_heads=2", "intermediate_size=128"]
    words = [word for setting in small for word in ("--set", f"model.{setting}")]
    words += ["--set", "tokenizer={train: {vocab_size: 512, max_documents: 200}}", "--rows", "1", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "enc.tools.bench.save", *words], env=environment, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["step_s"] > 0
    assert found["written_s"] > found["waited_s"] >= 0
    assert found["share"] == pytest.approx((found["waited_s"] + found["slower_s"]) / (100 * found["step_s"]))
