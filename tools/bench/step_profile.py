"""Where the time of a training step goes, by kind of operation: torch's profiler over enc's own loop.

On a GPU the time is that of the kernels, on a CPU that of the operators without those inside them (which counts threads
as one). A name belongs to the first kind whose words it contains.
"""

import re
from typing import Any

from torch.profiler import DeviceType, ProfilerActivity, profile

from enc.tools.bench.machine import machine_lines
from enc.tools.bench.step_sides import Side

# Of operators (aten::mm) and of CUDA and Triton kernels (nvjet_tst_..., _forward_kernel).
KINDS = {
    "data": r"dataloader",
    "optimizer": r"adam|multi_tensor|optimizer|clip_grad|foreach|lerp",
    "attention": r"attention|flash|fmha|softmax_warp",
    "matrix products": r"::mm$|::addmm|::bmm|::linear|matmul|gemm|nvjet|cutlass|xmma|wgmma",
    "casts and copies": r"copy|::to$|_to_copy|memcpy|memset|::contiguous|::cat$|catarray|::fill_|::zero_",
    "elementwise": r"elementwise|vectorized|reduce_kernel|norm|silu|swiglu|rope|rotate|gelu|triton|"
    r"::(mul|add|sub|div|neg|exp|log|sum|mean|rsqrt|square|where|masked_fill)_?$",
}

PROFILE_ADVICE = (
    "Shares of the time of enc's step by kind of operation, with the costliest names of each, by torch's profiler, "
    "which slows the step. On a GPU the time of the kernels, on a CPU that of the operators without those inside them."
)


def kind_of(name: str) -> str:
    """Return the kind of an operator or kernel."""
    return next((kind for kind, words in KINDS.items() if re.search(words, name.lower())), "other")


def profile_step(side: Side, steps: int, cuda: bool) -> dict[str, Any]:
    """Run a block of a side under the profiler; return seconds a step by kind, and the costliest names of each."""
    side(0, 1)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profile(activities=activities) as profiler:
        block = side(1, steps)
    names: dict[str, float] = {}
    for row in profiler.key_averages():
        if (row.device_type == DeviceType.CUDA) == cuda and not (cuda and row.is_user_annotation):
            spent = row.self_device_time_total if cuda else row.self_cpu_time_total
            names[row.key] = names.get(row.key, 0.0) + spent / 1e6
    whole = sum(names.values())
    kinds: dict[str, Any] = {kind: {"share": 0.0, "names": {}} for kind in [*KINDS, "other"]}
    for name, seconds in sorted(names.items(), key=lambda item: -item[1]):
        found = kinds[kind_of(name)]
        found["share"] += seconds / whole
        if len(found["names"]) < 3:
            found["names"][name] = seconds / whole
    return {"step_s": block.seconds / steps, "profiled_s": whole, "kinds": kinds}


def profile_table(report: dict[str, Any]) -> str:
    """Return shares by kind as text of at most 80 columns."""
    model = report["model"]
    lines = machine_lines(report["machine"])
    lines.append(f"{model['layers']} x {model['width']}, {report['rows']} rows of {report['row_length']} tokens")
    for dtype, found in report["results"].items():
        lines += ["", f"{dtype}: {1000 * found['step_s']:.1f} ms a step under the profiler"]
        for kind, part in sorted(found["kinds"].items(), key=lambda item: -item[1]["share"]):
            names = ", ".join(f"{name[:24]} {share:.1%}" for name, share in part["names"].items())
            lines.append(f"{part['share']:6.1%}  {kind:17} {names}"[:80].rstrip())
    return "\n".join(lines)
