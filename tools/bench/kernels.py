"""Measure the kernels of enc against what others offer: time, memory, error, and how near each is to the device's peak.

    enc bench kernels                                              # every kernel, on the GPU where there is one
    enc bench kernels masked_ce --dtype bf16 --rivals torch,liger  # one of them, against two
    enc bench kernels norms --threads 1 --clock cpu --json         # on a machine that is not quiet

Every side gets the same tensors. "forward" runs without any gradient wanted; "both" is forward and backward, the
gradients of all inputs returned. How time and memory are taken is in the head of `tools/bench/clocks.py`, the roofline
in `tools/bench/roofline.py`; it is measured before and after the sides, in the same process.

The error of a side is the worst of its results, output and gradients: the norm of the difference to a computation in
fp64 on the same inputs, relative to the norm of that. A side whose error is far beyond what its dtype explains is
marked: it computes something else, and its time says nothing. A side that is not installed or fails is a line that
says why.

"enc is" divides the other's time by enc's, round by round, and takes the median: above 1 enc is faster.
"""

import json
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from enc.encoder.errors import UsageError
from enc.encoder.printable import jsonable, printable
from enc.tools.bench.clocks import Timer, Work, extra_bytes, in_turn, make_timer, spread
from enc.tools.bench.machine import device_of, machine, machine_lines, refuse_unknown, write_page
from enc.tools.bench.operations import OPERATIONS, Operation, Shape, SideOf
from enc.tools.bench.roofline import Roofline, measure_roofline
from enc.tools.output import refuse_taken

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
PASSES = ("forward", "both")
PACKAGES = ("torch", "triton", "enc-toolkit", "liger-kernel", "cut-cross-entropy", "flash-attn")
_OURS = "enc"
# What rounding alone does not reach: a well-made side stays below a third of it, TF32 in place of fp32 does not.
_WRONG = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}
_ADVICE = (
    "`MB` is the peak of allocated memory beyond inputs and results, `error` the worst relative error against fp64 "
    "over output and gradients, `roof` the time that the peaks measured in this run allow, as a share of the time. "
    "`enc is` is the other's time over enc's, the median over rounds with the range."
)


@dataclass(frozen=True)
class Asked:
    """What to measure: the options of the command."""

    names: Sequence[str] = ()
    device: str | None = None
    dtypes: Sequence[str] = ("bf16", "fp32")
    shapes: Sequence[str] = ()
    rivals: Sequence[str] | None = None  # None: all
    rounds: int = 10
    threads: int | None = None
    clock: str = "wall"
    to: Path | None = None
    as_json: bool = False


def bench(asked: Asked, say: Callable[[str], None]) -> str:
    """Measure what was asked for, write the page if one is wanted, and return the table or JSON.

    Raises:
        UsageError: A name that is not known, a device that is not there, a file that cannot be written. Nothing ran.
    """
    if asked.to is not None:
        refuse_taken(asked.to, folder=False)
    device = device_of(asked.device)
    if asked.clock == "cpu" and device.type == "cuda":
        raise UsageError("--clock cpu counts the processor time of this process; on a GPU use wall, the default.")
    chosen = choose(asked, device)
    if asked.threads:
        torch.set_num_threads(asked.threads)
    found = measure_all(chosen, asked, device, say)
    taken = {"device": device.type, "clock": asked.clock, "rounds": asked.rounds}
    report = {"machine": machine(device, PACKAGES), **taken, **found}
    text = table(report)
    if asked.to is not None:
        write_page(asked.to, "Kernels", report["machine"], text, _ADVICE)
    return json.dumps(jsonable(report), indent=1) if asked.as_json else text


# --- what to measure -------------------------------------------------------------------------------------------------


def choose(asked: Asked, device: torch.device) -> list[tuple[str, Shape]]:
    """Return the operations and shapes that were asked for; refuse words that mean nothing."""
    refuse_unknown("--dtype", asked.dtypes, DTYPES)
    refuse_unknown("--clock", [asked.clock], ["wall", "cpu"])
    refuse_unknown("kernel", asked.names, OPERATIONS)
    names = list(asked.names or OPERATIONS)
    sides = {side for name in names for side in OPERATIONS[name].sides}
    refuse_unknown("--rivals", asked.rivals or (), sorted(sides - {_OURS}))
    return [(name, shape) for name in names for shape in _shapes(name, asked.shapes, device)]


def _shapes(name: str, words: Sequence[str], device: torch.device) -> list[Shape]:
    operation = OPERATIONS[name]
    if not words:
        return operation.default_shapes(device.type)
    return [operation.parse_shape(word) for word in words]


# --- measuring -------------------------------------------------------------------------------------------------------


def measure_all(
    chosen: list[tuple[str, Shape]], asked: Asked, device: torch.device, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure every operation, shape and dtype; return the rooflines and the results."""
    timer = make_timer(device, asked.clock)
    roofs = {dtype: measure_roofline(device, DTYPES[dtype], timer) for dtype in asked.dtypes}
    results = []
    for name, shape in chosen:
        for dtype in asked.dtypes:
            say(f"{name}, {dtype}: {shape_text(shape)}")
            sides = _chosen_sides(OPERATIONS[name], asked.rivals)
            for result in measure(OPERATIONS[name], sides, shape, DTYPES[dtype], device, asked.rounds, timer):
                results.append({"kernel": name, "shape": shape, "dtype": dtype, **result})
    roofs = {dtype: roof.best(measure_roofline(device, DTYPES[dtype], timer)) for dtype, roof in roofs.items()}
    for result in results:
        _add_roofline(result, roofs[result["dtype"]])
    return {"roofline": {dtype: roof.as_dict() for dtype, roof in roofs.items()}, "results": results}


def _chosen_sides(operation: Operation, rivals: Sequence[str] | None) -> list[str]:
    return [side for side in operation.sides if side == _OURS or rivals is None or side in rivals]


def measure(
    operation: Operation,
    sides: Sequence[str],
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
    timer: Timer,
) -> list[dict[str, Any]]:
    """Measure the sides of an operation at a shape: one result for the forward pass, one for both passes."""
    torch.compiler.reset()  # a compiled side meets each shape as its first, without the burden of dynamic ones
    inputs = [_moved(x, device) for x in operation.inputs(shape, dtype)]
    truth, upstream = exact_results(operation, inputs, dtype)
    results = []
    for which in PASSES:
        found: dict[str, dict[str, Any]] = {}
        works: dict[str, Work] = {}
        for side in sides:
            works[side] = work_of(operation.sides[side], inputs, upstream if which == "both" else ())
            why_not = operation.why_not(side, device.type)
            found[side] = {"why_not": why_not} if why_not else try_side(works[side], truth, dtype, device)
        seconds = in_turn({side: work for side, work in works.items() if "error" in found[side]}, rounds, timer)
        for side, values in seconds.items():
            found[side] |= {"seconds": spread(values), "rounds": values}
        _add_ratios(found)
        share = 1.0 if which == "both" else operation.forward_share
        num_bytes = share * operation.bytes(shape) * dtype.itemsize / 2
        cost = {"flops": share * operation.flops(shape), "bytes": num_bytes}
        results.append({"pass": which, **cost, "sides": found})
    return results


def _moved(x: Any, device: torch.device) -> Any:
    return x.detach().to(device).requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x


def work_of(side: SideOf, inputs: Sequence[Any], upstream: Sequence[Tensor]) -> Work:
    """Return one run of a side: its outputs and, given the gradients from above, those of the inputs that want one."""
    if not upstream:
        plain = [x.detach() if isinstance(x, Tensor) else x for x in inputs]

        def forward() -> Sequence[Tensor]:
            with torch.no_grad():
                return _outputs(side(*plain))

        return forward
    wanted = _wanting_gradients(inputs)

    def both() -> Sequence[Tensor]:
        outputs = _outputs(side(*inputs))
        above = [grad.to(out.dtype) for grad, out in zip(upstream, outputs, strict=True)]
        return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, wanted, above)]

    return both


def exact_results(operation: Operation, inputs: Sequence[Any], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Return outputs and gradients in fp64 for the same rounded inputs, and the gradients from above, for all sides."""
    wide = [
        x.detach().double().requires_grad_(x.requires_grad) if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in inputs
    ]
    outputs = _outputs(operation.exact(*wide))
    rng = torch.Generator().manual_seed(1)
    noise = [torch.randn(out.shape, generator=rng) if out.dim() else torch.ones(()) for out in outputs]
    upstream = [x.to(out.device, dtype) for x, out in zip(noise, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, _wanting_gradients(wide), [x.double() for x in upstream])
    return [*(out.detach() for out in outputs), *gradients], upstream


def _outputs(found: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [found] if isinstance(found, Tensor) else found


def _wanting_gradients(inputs: Sequence[Any]) -> list[Tensor]:
    return [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]


def try_side(work: Work, truth: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Run a side; return its error and memory, or why it cannot run."""
    try:
        error = worst_error(work(), truth)
        wrong = not error <= _WRONG[dtype]  # NaN is wrong too
        return {"error": error, "wrong": wrong, "extra_bytes": extra_bytes(work, device)}
    except Exception as failure:  # a rival raises whatever it likes
        first_line = (str(failure).splitlines() or ["no message"])[0]
        return {"why_not": f"{type(failure).__name__}: {printable(first_line, 200)}"}


def worst_error(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Return the largest relative error, in the Frobenius norm; NaN when there is one."""
    errors = [_relative(ours, exact) for ours, exact in zip(found, truth, strict=False)]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def _relative(found: Tensor, exact: Tensor) -> float:
    if found.shape != exact.shape:
        return math.inf
    return float((found.double() - exact).norm() / exact.norm().clamp_min(torch.finfo(torch.float64).tiny))


def _add_ratios(sides: dict[str, dict[str, Any]]) -> None:
    ours = sides.get(_OURS, {}).get("rounds")
    for name, side in sides.items():
        if ours and name != _OURS and "rounds" in side:
            side["enc_is_times"] = spread([theirs / mine for mine, theirs in zip(ours, side["rounds"], strict=True)])


def _add_roofline(result: dict[str, Any], roof: Roofline) -> None:
    result["floor_s"] = roof.floor_s(result["flops"], result["bytes"])
    for side in result["sides"].values():
        if "seconds" in side:
            side["roofline_fraction"] = result["floor_s"] / side["seconds"]["median"]


# --- the table -------------------------------------------------------------------------------------------------------


def shape_text(shape: Shape) -> str:
    """Return a shape as `--shape` takes it."""
    return ",".join(f"{key}={value}" for key, value in shape.items())


def table(report: dict[str, Any]) -> str:
    """Return the report as text of at most 80 columns."""
    lines = machine_lines(report["machine"])
    for dtype, roof in report["roofline"].items():
        lines.append(
            f"{dtype} peaks: {roof['flops'] / 1e12:.3g} TFLOP/s matmul, {roof['bandwidth'] / 1e9:.3g} GB/s copy"
        )
    lines.append(f"{report['rounds']} rounds, {report['clock']} time, medians (ranges)")
    for result in report["results"]:
        lines += ["", *_result_lines(result)]
    return "\n".join(lines)


def _result_lines(result: dict[str, Any]) -> list[str]:
    sides = result["sides"]
    width = max(map(len, sides)) + 1
    lines = textwrap.wrap(f"{result['kernel']} {result['pass']}, {result['dtype']}: {shape_text(result['shape'])}", 80)
    lines.append(f"{'side':{width}}{'ms':>7} {'(range)':15}{'MB':>8} {'error':>7} {'roof':>5}  enc is")
    for name, side in sides.items():
        lines += [_side_line(name, side, width)] if "seconds" in side else _reason_lines(name, side["why_not"], width)
    wrong = [name for name, side in sides.items() if side.get("wrong")]
    return lines + [f"! {name}: not the same computation, its time says nothing" for name in wrong]


def _side_line(name: str, side: dict[str, Any], width: int) -> str:
    seconds, ratio, megabytes = side["seconds"], side.get("enc_is_times"), side["extra_bytes"] / 1e6
    between = f"({_ms(seconds['min'])}-{_ms(seconds['max'])})"
    line = f"{name:{width}}{_ms(seconds['median']):>7} {between:15}{megabytes:8,.{1 if megabytes < 100 else 0}f} "
    line += f"{side['error']:7.1e}{'!' if side['wrong'] else ' '}{side['roofline_fraction']:5.0%}"
    if not ratio:
        return line
    middle, least, most = (f"{ratio[key]:.{2 if ratio[key] < 10 else 0}f}" for key in ("median", "min", "max"))
    line += f"  {middle} x"
    whole = f"{line} ({least}-{most})"
    return whole if len(whole) <= 80 else line


def _ms(seconds: float) -> str:
    """Return milliseconds in three or four digits."""
    ms = 1000 * seconds
    return f"{ms:.4f}" if ms < 0.1 else f"{ms:.3f}" if ms < 1 else f"{ms:.{max(0, 3 - len(str(int(ms))))}f}"


def _reason_lines(name: str, why_not: str, width: int) -> list[str]:
    return textwrap.wrap(f"{name:{width}}not run: {why_not}", 80, subsequent_indent=" " * width)
