"""`enc bench kernels`: its arithmetic, that it exposes wrong sides and names missing ones. No figures."""

import dataclasses
import json
import re
import shlex
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from running import Enc
from torch import Tensor
from typer.main import get_command

import enc as package
from enc.encoder.config.load import load_config
from enc.encoder.errors import UsageError
from enc.launcher.cli import bench as cli_bench
from enc.tools.bench import clocks
from enc.tools.bench.kernels import Asked, bench, choose, measure, measure_all, table, try_side, work_of, worst_error
from enc.tools.bench.operations import OPERATIONS, Operation
from enc.tools.bench.roofline import Roofline, measure_roofline
from enc.tools.bench.step import RIVALS

CPU = torch.device("cpu")
SHAPE = {"tokens": 64, "hidden": 32}


class FakeClock:
    """A clock that work moves on by hand."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def work(self, *durations: float) -> clocks.Work:
        """Return work that takes these seconds, run after run, the last one ever after."""
        left = list(durations)

        def run() -> list[Tensor]:
            self.seconds += left.pop(0) if len(left) > 1 else left[0]
            return []

        return run


def scaling(**sides: Callable[..., Tensor]) -> Operation:
    """Return an operation that multiplies a matrix by a vector, with these sides."""

    def inputs(shape: dict, dtype: torch.dtype) -> list[Tensor]:
        rng = torch.Generator().manual_seed(0)
        sizes = (shape["tokens"], shape["hidden"]), (shape["hidden"],)
        return [torch.randn(size, generator=rng).to(dtype).requires_grad_() for size in sizes]

    return Operation(
        {"enc": torch.mul, **sides}, {"small": SHAPE}, inputs, torch.mul, lambda _: 600.0, lambda _: 3000.0, 0.5,
        lambda side, _: "the package missing is not installed" if side == "missing" else None,
    )  # fmt: skip


def test_medians_and_ranges_by_a_fake_clock() -> None:
    """One number a round and side, blocks long enough for the clock, the warm-up left out, the order turning."""
    clock = FakeClock()
    order: list[str] = []

    def noting(name: str, work: clocks.Work) -> clocks.Work:
        return lambda: (order.append(name), work())[1]

    timer = clocks.HostTimer(clock, block_s=0.3)
    works = {"a": noting("a", clock.work(50, 0.1)), "b": noting("b", clock.work(50, 1, 2, 3, 7))}
    seconds = clocks.in_turn(works, 3, timer)
    assert seconds["a"] == pytest.approx([0.1, 0.1, 0.1])
    assert seconds["b"] == pytest.approx([2, 3, 7])  # 50 warmed up, 1 told how many runs make a block
    assert order == ["a"] * 2 + ["b"] * 2 + ["a"] * 3 + ["b"] * 2 + ["a"] * 6 + ["b"]
    assert clocks.spread([3, 1, 10]) == {"median": 3, "min": 1, "max": 10}


def test_extra_memory_is_the_peak_without_the_results() -> None:
    """Two temporaries that live at once count, one after the other once, what is returned not at all."""
    x, size = torch.zeros(2**20), 4 * 2**20

    def at_once() -> list[Tensor]:
        a, b = x + 1, x + 2
        return [a + b]

    def in_turn() -> list[Tensor]:
        total = x.sum()
        for number in range(3):
            total = total + (x + number).sum()
        return [total]

    assert clocks.extra_bytes(at_once, CPU) == pytest.approx(2 * size, abs=100)  # operators keep a number or two
    assert clocks.extra_bytes(in_turn, CPU) == pytest.approx(size, rel=0.01)
    assert clocks.extra_bytes(lambda: [x + 1], CPU) < 100
    assert clocks.extra_bytes(lambda: [x.cumsum(0)[:10]], CPU) < 100  # a view keeps all of its storage


def test_a_wrong_rival_is_exposed_by_its_error() -> None:
    """One that is off by a percent, forward or in one gradient only, is marked; a rounding one is not."""

    class HalfGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):  # type: ignore[no-untyped-def]
            ctx.save_for_backward(x, w)
            return x * w

        @staticmethod
        def backward(ctx, grad):  # type: ignore[no-untyped-def]
            x, w = ctx.saved_tensors
            return grad * w, (grad * x).sum(0) / 2

    operation = scaling(
        off=lambda x, w: x * w * 1.01, half=HalfGradient.apply, rounding=lambda x, w: (x.double() * w).float(),
        nan=lambda x, w: x * w * torch.nan, shapeless=lambda x, w: (x * w)[:1],
    )  # fmt: skip
    forward, both = measure(operation, list(operation.sides), SHAPE, torch.float32, CPU, 1, clocks.HostTimer())
    wrong = {r["pass"]: [name for name, side in r["sides"].items() if side.get("wrong")] for r in (forward, both)}
    assert wrong == {"forward": ["off", "nan", "shapeless"], "both": ["off", "half", "nan"]}
    assert forward["sides"]["off"]["error"] == pytest.approx(0.01, rel=1e-3)
    assert both["sides"]["half"]["error"] == pytest.approx(0.5, rel=1e-3)
    assert "RuntimeError" in both["sides"]["shapeless"]["why_not"]  # autograd refuses the gradient from above


def test_every_output_counts() -> None:
    """An operation with two outputs: an error in the second is seen, and gradients come from both."""
    two = dataclasses.replace(
        scaling(second=lambda x, w: (x * w, x + 1.01 * w), detached=lambda x, w: (x * w, x + w.detach())),
        exact=lambda x, w: (x * w, x + w),
    )
    sides = {**two.sides, "enc": two.exact}
    two = dataclasses.replace(two, sides=sides)
    for result in measure(two, list(sides), SHAPE, torch.float32, CPU, 1, clocks.HostTimer()):
        wrong = {name: side["wrong"] for name, side in result["sides"].items()}
        assert wrong == {"enc": False, "second": True, "detached": result["pass"] == "both"}


def test_error_is_the_worst_of_the_results() -> None:
    ones = torch.ones(4, dtype=torch.double)
    assert worst_error([ones * 1.1, ones], [ones, ones]) == pytest.approx(0.1)
    assert worst_error([ones, ones[:2]], [ones, ones]) == float("inf")
    assert worst_error([ones, ones * torch.nan], [ones, ones]) != worst_error([ones], [ones])
    assert worst_error([ones * 0], [ones * 0]) == 0


def test_a_side_that_is_missing_or_fails_says_why() -> None:
    """Both are in the results and the table; the others are measured all the same."""

    def broken(x: Tensor, w: Tensor) -> Tensor:
        raise NotImplementedError("no kernel for this chip\nand much more")

    operation = scaling(missing=torch.mul, broken=broken, torch=lambda x, w: w * x)
    results = measure(operation, list(operation.sides), SHAPE, torch.float32, CPU, 2, clocks.HostTimer())
    for result in results:
        sides = result["sides"]
        assert sides["missing"] == {"why_not": "the package missing is not installed"}
        assert sides["broken"] == {"why_not": "NotImplementedError: no kernel for this chip"}
        assert len(sides["torch"]["rounds"]) == 2


def test_forward_wants_no_gradient_and_both_gives_all() -> None:
    """A side that makes gradients while going forward is spared that when nobody wants them."""
    wanted: list[bool] = []

    def side(x: Tensor, w: Tensor) -> Tensor:
        wanted.append(torch.is_grad_enabled() and x.requires_grad)
        return x * w

    inputs = scaling().inputs(SHAPE, torch.float32)
    assert [t.shape for t in work_of(side, inputs, [])()] == [(64, 32)]
    assert [t.shape for t in work_of(side, inputs, [torch.ones(64, 32)])()] == [(64, 32), (64, 32), (32,)]
    assert wanted == [False, True]
    assert all(x.grad is None for x in inputs)


def test_roofline_is_the_longer_of_operations_and_bytes() -> None:
    roof = Roofline(100.0, 10.0)
    assert roof.floor_s(200, 10) == 2
    assert roof.floor_s(200, 50) == 5
    assert roof.best(Roofline(50, 20)) == Roofline(100, 20)


def test_roofline_counts_operations_and_bytes() -> None:
    """By a timer that always says 2 seconds."""

    class Timer:
        def num_runs(self, work: clocks.Work) -> int:
            return 1

        def __call__(self, work: clocks.Work, runs: int) -> float:
            work()
            return 2.0

    assert measure_roofline(CPU, torch.float32, Timer(), 16, 1000) == Roofline(16**3, 1000)


@pytest.fixture
def small_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure the roofline with small matrices: figures do not matter here."""
    monkeypatch.setattr("enc.tools.bench.kernels.measure_roofline", lambda *words: measure_roofline(*words, 64, 2**16))


TINY = {
    "masked_ce": ["tokens=40,hidden=16,vocab=130"],
    "varlen_attention": [f"tokens=96,length=40,natural=1,heads=2,head_dim=16,buckets={number}" for number in (0, 32)],
    "norms": ["tokens=33,hidden=24"],
    "add_norms": ["tokens=33,hidden=24"],
    "swiglu": ["tokens=33,hidden=24"],
    "rope": ["tokens=33,heads=2,head_dim=8"],
}


@pytest.mark.usefixtures("small_peaks")
@pytest.mark.parametrize("name", list(OPERATIONS))
def test_every_kernel_runs_and_agrees_with_the_exact_result(name: str) -> None:
    """At a tiny odd shape: enc's side and those of torch are right in both dtypes; figures follow from each other."""
    rivals = [side for side in OPERATIONS[name].sides if side == "torch" or side.startswith("sdpa")]
    asked = Asked([name], "cpu", shapes=TINY[name], rivals=rivals, rounds=3)
    report = measure_all(choose(asked, CPU), asked, CPU, lambda _: None)
    cases = [(dtype, which) for dtype in ("bf16", "fp32") for which in ("forward", "both")]
    assert [(r["dtype"], r["pass"]) for r in report["results"]] == cases * len(TINY[name])
    for result in report["results"]:
        peaks, ours = report["roofline"][result["dtype"]], result["sides"]["enc"]
        floor = max(result["flops"] / peaks["flops"], result["bytes"] / peaks["bandwidth"])
        assert set(result["sides"]) == {"enc", *rivals}
        for side_name, side in result["sides"].items():
            assert not side["wrong"], side_name
            assert side["seconds"]["median"] == statistics.median(side["rounds"])
            assert (side["seconds"]["min"], side["seconds"]["max"]) == (min(side["rounds"]), max(side["rounds"]))
            assert side["roofline_fraction"] == pytest.approx(floor / side["seconds"]["median"])
            if side_name != "enc":
                ratios = [theirs / mine for mine, theirs in zip(ours["rounds"], side["rounds"], strict=True)]
                assert side["enc_is_times"]["median"] == pytest.approx(statistics.median(ratios))


def test_the_command_prints_a_table_writes_a_page_and_refuses_to_write_it_again(enc: Enc) -> None:
    """Within 80 columns: machine, versions, peaks, each side; the page has the table, the date and the command."""
    words = ["bench", "kernels", "norms", "--device", "cpu", "--rounds", "2", "--dtype", "bf16", "--threads", "1"]
    words += ["--shape", TINY["norms"][0], "--rivals", "torch"]
    text = enc(*words, "--to", "pages/norms.md").stdout
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert "1 threads" in lines[0]
    assert "torch 2" in lines[1]
    assert "TFLOP/s" in lines[2]
    assert [line.split()[0] for line in lines[-2:]] == ["enc", "torch"]
    assert " x (" in lines[-1]
    page = (enc.folder / "pages" / "norms.md").read_text()
    assert page.startswith("# Kernels on a CPU\n")
    assert text in page
    assert "bench kernels norms --device cpu" in page
    with pytest.raises(UsageError, match="exists"):
        bench(Asked(to=enc.folder / "pages" / "norms.md"), print)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (Asked(["norm"]), "kernel norm is not known; did you mean norms?"),
        (Asked(dtypes=["bf61"]), "--dtype bf61 is not known; did you mean bf16?"),
        (Asked(clock="sun"), "--clock sun is not known. Known are: wall, cpu."),
        (Asked(["masked_ce"], rivals=["torhc"]), "--rivals torhc is not known; did you mean torch?"),
        (Asked(["norms"], shapes=["token=3"]), "--shape token=3 is not known; did you mean tokens?"),
        (Asked(["norms"], shapes=["tokens=many"]), "tokens must be a number like"),
        (Asked(["norms"], shapes=["tokens=0"]), "tokens must be at least 1"),
        (Asked(device="gpu"), "--device gpu is not known"),
        (Asked(to=Path("/")), "is no name for something new"),
    ],
)
def test_a_mistake_is_found_before_anything_runs(asked: Asked, said: str) -> None:
    started: list[str] = []
    with pytest.raises(UsageError, match=re.escape(said)):
        bench(asked, started.append)
    assert not started


def test_the_command_tells_of_a_mistake_in_one_line(enc: Enc) -> None:
    done = enc("bench", "kernels", "norm", "--device", "cpu", code=2)
    assert done.stderr.startswith("enc: kernel norm is not known; did you mean norms? Known are: masked_ce, ")
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(UsageError, match=r"--device cuda: torch \S+ (sees no GPU|was built without CUDA)"):
        bench(Asked(device="cuda"), print)


def test_the_commands_for_a_gpu_machine_mean_something() -> None:
    """Those of docs/benchmarks/README.md, which run on GPUs only: options, kernels, shapes, keys of the config."""
    page = Path(package.__file__).parent / "docs" / "benchmarks" / "README.md"
    block = "".join(re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.S)).replace("\\\n", " ")
    found = [shlex.split(line, comments=True)[2:] for line in block.splitlines() if line.startswith("enc bench")]
    assert len(found) >= 5
    for name, *words in found:
        command = get_command(cli_bench.app).commands[name]
        options = command.make_context(name, words).params
        if name == "kernels":
            asked = Asked(options["names"] or [], "cpu", shapes=options["shape"] or [])
            assert choose(asked, CPU)
        else:
            load_config(options["config"] or "neobert-250m")
            assert set((options["against"] or "full").split(",")) <= set(RIVALS)


def test_help_fits_80_columns(enc: Enc) -> None:
    for command in ([], ["kernels"], ["step"]):
        text = enc("bench", *command, "--help").stdout
        assert max(map(len, text.splitlines())) <= 80
        assert "Measure" in text


def test_table_shows_wrong_and_missing_sides() -> None:
    """A wrong side is named under its table, a missing one has its reason, long ones are wrapped."""
    operation = scaling(off=lambda x, w: x * w * 1.01, missing=torch.mul)
    results = measure(operation, list(operation.sides), SHAPE, torch.float32, CPU, 1, clocks.HostTimer())
    for result in results:
        result |= {"kernel": "scaling", "shape": SHAPE, "dtype": "fp32", "floor_s": 0.0}
        result["sides"]["missing"]["why_not"] += ", and a long story about how to install it on every system there is"
        for side in result["sides"].values():
            side["roofline_fraction"] = 0.5
    host = {"cpu": "chip", "flags": [], "cores": 1, "threads": 1, "versions": {"torch": "2"}}
    text = table({"machine": host, "roofline": {}, "rounds": 1, "clock": "wall", "results": results})
    assert "! off: not the same computation, its time says nothing" in text
    assert "missing not run: the package missing is not installed" in text
    assert max(map(len, text.splitlines())) <= 80


def test_out_of_memory_is_a_reason() -> None:
    def work() -> list[Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.\nMore.")

    found = try_side(work, [], torch.float32, CPU)
    assert found == {"why_not": "OutOfMemoryError: CUDA out of memory. Tried to allocate 3 GiB."}


@pytest.mark.usefixtures("small_peaks")
def test_json_is_the_whole_report() -> None:
    asked = Asked(["rope"], "cpu", ["fp32"], TINY["rope"], ["torch"], rounds=2, as_json=True)
    report = json.loads(bench(asked, lambda _: None))
    assert {"machine", "device", "clock", "rounds", "roofline", "results"} == set(report)
    assert {"cpu", "cores", "threads", "versions", "date", "command"} <= set(report["machine"])
    assert dataclasses.asdict(Roofline(**report["roofline"]["fp32"])) == report["roofline"]["fp32"]
    assert [len(r["sides"]["enc"]["rounds"]) for r in report["results"]] == [2, 2]
