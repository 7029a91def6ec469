"""Consolidating, converting and comparing checkpoints: every value arrives, and nothing half-written is left."""

import json
import math
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from foreign import run_writer
from running import Enc
from safetensors.torch import load_file, save_file

from enc.encoder.checkpoints.tensor_file import TensorSpec
from enc.encoder.errors import UsageError
from enc.tools.consolidate import consolidate, cut_into_shards, parse_size
from enc.tools.convert import convert
from enc.tools.diff import diff_sources, diff_text, is_equal
from enc.tools.readers.detect import open_source
from enc.tools.readers.source import Source
from enc.tools.tensor_stats import difference_of, stats_of

MOMENTS = ("exp_avg", "exp_avg_sq")


def true_weights(foreign: Path, case: str) -> dict[str, torch.Tensor]:
    state = load_file(foreign / f"{case}.safetensors")
    weights = {name: tensor for name, tensor in state.items() if not name.startswith(MOMENTS)}
    return {**weights, "head.weight": weights["embedding.weight"], "offset": torch.arange(5.0)}


# --- consolidate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, "fp32", "bf16"])
@pytest.mark.parametrize("case", ["z2-bf16", "z3-fp32", "fsdp"])
def test_consolidated_weights_are_the_true_ones(foreign: Path, tmp_path: Path, case: str, dtype: str | None) -> None:
    """As one file and as shards with an index, in the dtype asked for."""
    weights = open_source(foreign / case).weights
    expected = true_weights(foreign, case)
    if dtype == "bf16":
        expected = {name: tensor.bfloat16() for name, tensor in expected.items()}
    if case == "fsdp":
        del expected["offset"]  # a buffer that FSDP's state dict was not asked for
        weights = {name: weights[name] for name in expected}
    consolidate(weights, tmp_path / "one.safetensors", dtype, "5GB")
    written = consolidate(weights, tmp_path / "shards", dtype, "1KB")
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert [path.name for path in shards] == [
        f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)
    ]
    assert written.num_files == len(shards) > 1
    joined = {name: tensor for path in shards for name, tensor in load_file(path).items()}
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == expected.keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in expected.values())
    for found in (load_file(tmp_path / "one.safetensors"), joined):
        assert found.keys() == expected.keys()
        assert all(
            torch.equal(found[name], expected[name]) and found[name].dtype == expected[name].dtype for name in found
        )


class _Counted:
    """A stored tensor that fails to be read while another one is in memory."""

    spec = TensorSpec(torch.float32, (1000,))
    last: weakref.ref = staticmethod(lambda: None)

    def read(self) -> torch.Tensor:
        assert _Counted.last() is None, "two tensors are in memory"
        tensor = torch.ones(1000)
        _Counted.last = weakref.ref(tensor)
        return tensor


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """Each is let go before the next is read, however many files there are."""
    weights = {f"w{number}": _Counted() for number in range(9)}
    consolidate(weights, tmp_path / "one.safetensors", None, "5GB")
    consolidate(weights, tmp_path / "shards", "bf16", "9KB")
    convert(Source(tmp_path, "test", weights), "dcp", tmp_path / "dcp", None)
    assert len(open_source(tmp_path / "shards").weights) == len(open_source(tmp_path / "dcp").weights) == 9


def test_a_tensor_that_is_larger_than_a_shard_gets_its_own(foreign: Path) -> None:
    specs = {name: stored.spec for name, stored in open_source(foreign / "z3-fp32").weights.items()}
    assert [len(shard) for shard in cut_into_shards(specs, 1)] == [1] * len(specs)
    assert len(cut_into_shards(specs, 10**9)) == 1


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 GiB", 3 * 2**29), ("300", 300), ("2mb", 2 * 10**6)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "0", "5 apples", "1.2.3GB", "9" * 400])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="max-shard-size"):
        parse_size(text)


def test_what_is_there_is_never_overwritten_and_a_failure_leaves_nothing(foreign: Path, tmp_path: Path) -> None:
    """A taken place is refused; a shard that turns out to be short while it is read leaves no output."""
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    folder = shutil.copytree(foreign / "z3-fp32", tmp_path / "z3")
    source = open_source(folder)
    weights = source.weights
    with pytest.raises(UsageError, match="not empty"):
        consolidate(weights, tmp_path / "taken", None, "5GB")
    with pytest.raises(UsageError, match="is a file"):
        consolidate(weights, tmp_path / "taken" / "notes.txt" / "out", None, "5GB")
    with pytest.raises(UsageError, match="'fp8'; allowed: fp32, bf16"):
        consolidate(weights, tmp_path / "out", "fp8", "5GB")
    path = next(folder.rglob("*rank_1*optim*"))
    path.write_bytes(path.read_bytes()[:2000])
    for name in ("new/out", "out.safetensors"):
        with pytest.raises(UsageError, match="damaged"):
            consolidate(weights, tmp_path / name, None, "5GB")
    for to in ("universal", "dcp", "safetensors"):
        with pytest.raises(UsageError, match="damaged"):
            convert(source, to, tmp_path / "out", None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["taken", "z3"]


def test_only_what_was_made_here_is_removed(tmp_path: Path) -> None:
    """A folder with the name of a temporary one, even the source itself, stays; no link is followed or replaced."""
    source = tmp_path / ".out.tmp"
    source.mkdir()
    save_file({"w": torch.ones(2)}, source / "model.safetensors")
    weights = open_source(source).weights
    consolidate(weights, tmp_path / "out", None, "5GB")
    assert (source / "model.safetensors").is_file()
    assert (tmp_path / "out").stat().st_mode & 0o777 == source.stat().st_mode & 0o777
    (tmp_path / "link").symlink_to(tmp_path / "nothere")
    places = ["link", "x" * 300, "out/model.safetensors/x", "new/.."]
    for place in [*(tmp_path / name for name in places), Path("/proc/enc/x")]:
        with pytest.raises(UsageError, match=r"[Cc]hoose|Name"):
            consolidate(weights, place, None, "5GB")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.tmp", "link", "out"]


def test_what_safetensors_cannot_hold_is_named(tmp_path: Path) -> None:
    state = {"c": torch.ones(2, dtype=torch.complex128)}, {"__metadata__": torch.ones(2)}, {"\ud800": torch.ones(2)}
    for number, tensors in enumerate(state):
        torch.save(tensors, tmp_path / f"{number}.pt")
        with pytest.raises(UsageError, match="safetensors cannot hold"):
            consolidate(open_source(tmp_path / f"{number}.pt").weights, tmp_path / "out", None, "5GB")


# --- convert ---------------------------------------------------------------------------------------------------------


def test_deepspeed_loads_a_universal_folder_at_every_stage(foreign: Path, tmp_path: Path) -> None:
    """Two real ranks at ZeRO 1, 2 and 3 find the weights, moments and step of a ZeRO-3 run, and train on."""
    convert(open_source(foreign / "z3-bf16"), "universal", tmp_path / "universal", None)
    run_writer("load", str(tmp_path / "universal"), str(foreign / "z3-bf16.safetensors"))


@pytest.mark.parametrize("to", ["universal", "dcp", "safetensors"])
@pytest.mark.parametrize("case", ["z1-bf16-fp32grads", "z3-fp32", "fsdp"])
def test_every_conversion_reads_back(foreign: Path, tmp_path: Path, case: str, to: str) -> None:
    """Weights, moments and steps are the same bits in every format."""
    source = open_source(foreign / case)
    if (case, to) == ("fsdp", "universal"):  # its buffer looks like a weight that was never trained
        with pytest.raises(UsageError, match="lacks exp_avg of offset"):
            convert(source, to, tmp_path / "out", None)
        source = replace(source, buffers=frozenset({"offset"}))
    written = convert(source, to, tmp_path / "out", None)
    again = open_source(tmp_path / "out")
    assert written.num_tensors == len(again.tensors)
    assert set(written.left_out) == source.weights.keys() - again.weights.keys()
    found = diff_sources(source, again)
    assert not found["different"]
    assert not found["other_kind"]
    assert not found["only_in_b"]
    assert again.moments.keys() == source.moments.keys()
    assert again.counters["optimizer_steps"] == 3


def test_torch_loads_the_converted_dcp_folder(foreign: Path, tmp_path: Path) -> None:
    """dcp.load fills nested state dicts by the names of get_state_dict."""
    convert(open_source(foreign / "z2-fp32"), "dcp", tmp_path / "out", "bf16")
    expected = load_file(foreign / "z2-fp32.safetensors")
    weights = {"first.weight": torch.zeros(13, 6, dtype=torch.bfloat16)}
    state = {"first.weight": {"exp_avg": torch.zeros(13, 6), "step": torch.zeros(())}}
    with pytest.warns(UserWarning, match="single process"):
        dcp.load({"model": weights, "optim": {"state": state}}, checkpoint_id=tmp_path / "out", no_dist=True)
    assert torch.equal(weights["first.weight"], expected["first.weight"].bfloat16())
    assert torch.equal(state["first.weight"]["exp_avg"], expected["exp_avg.first.weight"])
    assert state["first.weight"]["step"] == 3


def moments_of(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"{kind}.{name}": torch.rand(weight.shape) for kind in MOMENTS}


def test_conversions_that_cannot_be(foreign: Path, tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "w.safetensors")
    save_file(
        {"../w": torch.ones(2), "exp_avg.../w": torch.ones(2), "exp_avg_sq.../w": torch.ones(2)},
        tmp_path / "x.safetensors",
    )
    w = torch.ones(2)
    whole = {"a": w, **moments_of("a", w)}
    save_file({"..": w, **moments_of("..", w)}, tmp_path / "dots.safetensors")
    save_file({"a\0b": w, **moments_of("a\0b", w)}, tmp_path / "nul.safetensors")
    save_file({**whole, "b": w.clone()}, tmp_path / "none.safetensors")
    save_file({**whole, "b": w.clone(), "exp_avg.b": w.clone()}, tmp_path / "one.safetensors")
    save_file({**whole, "exp_avg.ghost": w.clone()}, tmp_path / "ghost.safetensors")
    cases = [
        ("w", "universal", "no optimizer moments"),
        ("w", "torch", "allowed: universal"),
        ("x", "universal", "cannot be a folder"),
        ("dots", "universal", "cannot be a folder"),
        ("nul", "universal", r"'a\\x00b', which cannot be a folder"),
        ("none", "universal", "lacks exp_avg of b, exp_avg_sq of b, in the same shape"),
        ("one", "universal", "lacks exp_avg_sq of b, the weight of exp_avg.b"),
        ("ghost", "universal", "lacks the weight of exp_avg.ghost"),
    ]
    for name, to, message in cases:
        with pytest.raises(UsageError, match=message):
            convert(open_source(tmp_path / f"{name}.safetensors"), to, tmp_path / "out", None)
    with pytest.raises(UsageError, match="numbers the parameters"):
        convert(open_source(foreign / "z0-fp32"), "dcp", tmp_path / "out", None)
    assert not (tmp_path / "out").exists()


def test_weights_that_need_no_moments_are_left_out_by_name(tmp_path: Path) -> None:
    """Whole numbers, rotary tables and second names of tied weights; what is counted is what was written."""
    a = torch.randn(2, 3)
    extra = {"tied": a.clone(), "ids": torch.arange(3), "model.freqs_cos": torch.rand(4)}
    save_file({"a": a, **extra, **moments_of("a", a)}, tmp_path / "w.safetensors")
    source = open_source(tmp_path / "w.safetensors")
    written = convert(source, "universal", tmp_path / "out", None)
    assert (set(written.left_out), written.num_tensors, written.num_bytes) == (set(extra), 3, 72)
    assert convert(source, "dcp", tmp_path / "dcp", None).num_tensors == 6
    assert open_source(tmp_path / "dcp").weights.keys() == {"a", *extra}


@pytest.mark.parametrize("to", ["universal", "dcp"])
def test_no_updates_is_a_number_of_updates(tmp_path: Path, to: str) -> None:
    """Moments that are zero must not get the age of the run, or their bias would not be corrected."""
    a = torch.ones(2)
    save_file({"a": a, **moments_of("a", a)}, tmp_path / "w.safetensors")
    source = replace(open_source(tmp_path / "w.safetensors"), counters={"step": 7, "optimizer_steps": 0})
    convert(source, to, tmp_path / "out", None)
    assert open_source(tmp_path / "out").counters["optimizer_steps"] == 0


# --- comparing -------------------------------------------------------------------------------------------------------


def test_diff_finds_each_kind_of_difference(tmp_path: Path) -> None:
    a = {"same": torch.ones(3), "nan": torch.tensor([math.nan, 1.0]), "moved": torch.tensor([1.0, -4.0]),
         "cast": torch.ones(2), "shape": torch.ones(2), "a": torch.ones(1)}  # fmt: skip
    b = {"same": torch.ones(3), "nan": torch.tensor([math.nan, 1.0]), "moved": torch.tensor([1.0, -3.0]),
         "cast": torch.ones(2).bfloat16(), "shape": torch.ones(1, 2), "b": torch.ones(1)}  # fmt: skip
    save_file(a, tmp_path / "a.safetensors")
    save_file(b, tmp_path / "b.safetensors")
    found = diff_sources(*(open_source(tmp_path / f"{name}.safetensors") for name in "ab"))
    assert (found["only_in_a"], found["only_in_b"], found["num_equal"]) == (["a"], ["b"], 2)
    assert [row["name"] for row in found["other_kind"]] == ["cast", "shape"]
    moved = next(row for row in found["different"] if row["name"] == "moved")
    assert (moved["max_abs"], moved["relative"]) == (1.0, 0.25)
    assert not is_equal(found)
    assert all(len(line) <= 80 for line in diff_text(found).splitlines())
    source = open_source(tmp_path / "a.safetensors")
    assert is_equal(diff_sources(source, source))
    save_file({"other": torch.ones(2)}, tmp_path / "c.safetensors")
    with pytest.raises(UsageError, match="no tensor name in common"):
        diff_sources(source, open_source(tmp_path / "c.safetensors"))


def test_configs_that_only_json_finds_hard(tmp_path: Path) -> None:
    """A value that is not a number equals itself, and a config that holds itself is refused."""
    for name, text in {"a": "x: .nan\n", "b": "x: .nan\n", "c": "x: &x\n  y: *x\n"}.items():
        (tmp_path / name).mkdir()
        save_file({"w": torch.ones(2)}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.yaml").write_text(text)
    a, b, c = (open_source(tmp_path / name) for name in "abc")
    assert is_equal(diff_sources(a, b))
    with pytest.raises(UsageError, match="holds itself"):
        diff_sources(a, c)


def test_statistics_of_any_dtype() -> None:
    """The norm of complex values counts both parts; each value that is not finite counts once."""
    values = torch.tensor([3 + 4j, 12j, complex(math.nan, math.inf)])
    assert stats_of(values[:2]).norm == pytest.approx(13.0)
    assert stats_of(values).non_finite == 1
    moved = difference_of(values, torch.tensor([3 + 4j, 7j, complex(math.nan, math.inf)]))
    assert (moved.same_bits, moved.max_abs, moved.unlike_non_finite) == (False, 5.0, 0)
    assert difference_of(values, values.clone()).same_bits
    for dtype in (torch.uint16, torch.float8_e4m3fn):
        assert stats_of(torch.tensor([3.0, 4.0]).to(dtype)).norm == 5.0


def test_statistics_over_several_blocks() -> None:
    """Blocks change nothing, and values that are not finite are counted, not summed into the rest."""
    big = torch.randn(2**22 + 77, dtype=torch.float64)
    assert stats_of(big).norm == pytest.approx(big.norm().item(), rel=1e-12)
    big[[3, -1]] = torch.tensor([math.inf, math.nan], dtype=torch.float64)
    assert stats_of(big).non_finite == 2
    other = big.clone()
    other[-2], other[-1] = other[-2] + 0.5, 0.0
    difference = difference_of(big, other)
    assert difference.max_abs == pytest.approx(0.5)
    assert (difference.same_bits, difference.unlike_non_finite) == (False, 1)


# --- the command line ------------------------------------------------------------------------------------------------


def test_the_commands_on_a_run(finished_run: Path, enc: Enc) -> None:
    """inspect, diff, consolidate, convert and prune on a run of ours, as a user types them."""
    run = shutil.copytree(finished_run, enc.folder / "run")
    inspected = enc("ckpt", "inspect", "run").stdout
    assert all(len(line) <= 80 for line in inspected.splitlines())
    for text in ("in epoch 0", "optimizer_steps    6", "exp_avg_sq: ", "batch "):
        assert text in inspected
    assert "0 differ" not in enc("ckpt", "diff", "run/checkpoints/3", "run/checkpoints/6", code=1).stdout
    same = json.loads(enc("ckpt", "diff", "run", "run/checkpoints/6", "--json").stdout)
    assert same["num_equal"] == 3 * len(load_file(run / "checkpoints" / "6" / "model.safetensors"))
    assert enc("ckpt", "consolidate", "run", "--out", "w.safetensors").stdout == "w.safetensors\n"
    assert enc("ckpt", "convert", "run", "--to", "universal", "--out", "universal").stdout == "universal\n"
    enc("ckpt", "diff", "w.safetensors", "run", code=1)
    assert json.loads(enc("ckpt", "verify", "universal", "--json").stdout)[0]["state"] == "complete"
    doomed = enc("ckpt", "prune", "run", "--keep", "1", "--dry-run").stdout
    assert doomed == "run/checkpoints/3\n"
    assert enc("ckpt", "prune", "run", "--keep", "1").stdout == doomed
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["6"]
