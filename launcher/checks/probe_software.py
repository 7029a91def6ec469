"""What `enc doctor` makes of software, GPUs and compilers.

A probe observes; what it makes of that is a function of what was observed, which tests call with other values.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

import enc
from enc import __version__
from enc.encoder.config.schema import RunConfig
from enc.encoder.errors import UsageError
from enc.launcher.checks import environment
from enc.launcher.checks.findings import Finding, green, red, yellow
from enc.launcher.machine.build_locks import build_locks, extensions_folder
from enc.launcher.machine.facts import MachineFacts
from enc.launcher.machine.gpus import InstalledGpu

_SHOWN = ("torch", "deepspeed", "transformers", "datasets", "tokenizers", "triton", "flash-attn", "wandb")


# --- software --------------------------------------------------------------------------------------------------------


def versions() -> list[Finding]:
    """Look at what is installed, and compare it with what enc and torch ask for."""
    python = f"{__version__} in {os.path.dirname(enc.__file__)}, Python {sys.version.split()[0]}"
    asked = [*_requirements("enc-toolkit"), *(r for r in _requirements("torch") if r.name == "triton")]
    return [green("enc", python), *check_versions({name: _version(name) for name in _SHOWN}, asked, _version)]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _requirements(distribution: str) -> list[Requirement]:
    """Return what a distribution needs on this platform, without its extras."""
    try:
        found = [Requirement(text) for text in metadata.requires(distribution) or []]
    except metadata.PackageNotFoundError:
        return []
    return [one for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]


def check_versions(shown: dict[str, str | None], asked: list[Requirement], version_of: Any) -> Iterator[Finding]:
    """A version outside of what is asked for is a combination that nobody has tested."""
    bad = {one.name: one for one in asked if not _meets(one, version_of(one.name))}
    for name, one in bad.items():
        has = version_of(name)
        text = f"{name} {has} is outside {one.specifier}" if has else f"{name} is missing"
        yield red(name, text, f"pip install '{name}{one.specifier}'")
    there = [f"{name} {version}" for name, version in shown.items() if version and name not in bad]
    if there:
        yield green("packages", ", ".join(there))
    absent = [name for name, version in shown.items() if version is None and name not in bad]
    if absent:
        yield green("not installed", f"{', '.join(absent)} (optional)")


def _meets(one: Requirement, version: str | None) -> bool:
    return version is not None and one.specifier.contains(version, prereleases=True)


def ask_torch(timeout_s: float) -> dict[str, Any]:
    """Let a process of its own import torch and say what it finds.

    Raises UsageError when it cannot, and TimeoutError when that takes too long.
    """
    command = [sys.executable, "-P", "-m", "enc.encoder.run.torch_facts"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"importing it and asking for GPUs took more than {timeout_s:g} s") from None
    try:
        facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        said = done.stderr.strip().splitlines()[-1:] or [f"it ended with code {done.returncode}"]
        raise UsageError(f"`import torch` fails: {said[0]}") from None
    return facts


def check_torch(facts: dict[str, Any], num_gpus: int) -> Iterator[Finding]:
    """torch must be built for the GPUs that are here. `num_gpus` is what the driver shows."""
    built = f"built for CUDA {facts['cuda']}" if facts["cuda"] else "built without CUDA"
    if num_gpus and not facts["cuda"]:
        yield red("torch", f"{facts['torch']} is {built}, but this machine has GPUs: runs would use the CPU",
                  "install a CUDA build of torch (https://pytorch.org)")  # fmt: skip
    elif num_gpus and not facts["cuda_available"]:
        yield red("torch", f"{facts['torch']}, {built}, cannot use the GPUs here: {facts['cuda_said'] or 'no reason'}",
                  "a newer driver, or a torch built for an older CUDA; see `nvidia-smi`")  # fmt: skip
    else:
        yield green("torch", f"{facts['torch']}, {built}")
    for gpu in facts["gpus"]:
        if not _has_kernels(gpu["capability"], facts["architectures"]):
            text = f"{facts['torch']} has no kernels for {gpu['name']} (compute capability {_dotted(gpu)})"
            yield red("torch", text, "install a torch build that names this GPU's architecture")
    if facts["flash_attn"]:
        yield yellow("flash-attn", f"it is installed but cannot be imported: {facts['flash_attn']}",
                     "build it for this torch, or uninstall it")  # fmt: skip


def _dotted(gpu: dict[str, Any]) -> str:
    return ".".join(map(str, gpu["capability"]))


def _has_kernels(capability: list[int], architectures: list[str]) -> bool:
    """Tell whether torch has code for a device: its own, of an older minor of the same major, or to be translated."""
    for name in architectures:
        kind, _, digits = name.partition("_")
        number = int("".join(filter(str.isdigit, digits)) or 0)
        if kind == "compute" and [number // 10, number % 10] <= capability:
            return True
        if kind == "sm" and number // 10 == capability[0] and number % 10 <= capability[1]:
            return True
    return not architectures


def check_nccl(facts: dict[str, Any]) -> Iterator[Finding]:
    """Say which NCCL torch brings."""
    yield green("NCCL", facts["nccl"] or "none in this build of torch; ranks on CPUs use gloo")


def check_fast_paths(facts: dict[str, Any]) -> Iterator[Finding]:
    """Say for each kernel whether its fast path runs, and why not."""
    for name, reason in facts["why_not"].items():
        yield green(name, reason or "the fast path runs")


# --- GPUs ------------------------------------------------------------------------------------------------------------


def check_gpus(gpus: list[InstalledGpu], visible: str | None) -> Iterator[Finding]:
    """GPUs should be alike, empty and visible."""
    if not gpus:
        yield green("GPUs", "none on this machine")
        return
    kinds = {(gpu.name, gpu.total): sum((o.name, o.total) == (gpu.name, gpu.total) for o in gpus) for gpu in gpus}
    named = ", ".join(f"{count} x {name} of {total / 1024:.0f} GiB" for (name, total), count in kinds.items())
    text = f"{named}, compute capability {', '.join(sorted({g.capability for g in gpus}))}, driver {gpus[0].driver}"
    if len(kinds) > 1:
        yield yellow(
            "GPUs", f"they differ: {text}", "choose equal ones with CUDA_VISIBLE_DEVICES: the slowest sets the pace"
        )
    else:
        yield green("GPUs", text)
    for gpu in gpus:
        if gpu.used > 0.05 * gpu.total:
            yield yellow("GPU in use", f"GPU {gpu.index} has {gpu.used / 1024:.1f} of {gpu.total / 1024:.0f} GiB taken "
                         "by other processes", "`nvidia-smi` shows whose; wait, or choose others")  # fmt: skip
    if visible is not None:
        yield from _check_visible(visible, [gpu.index for gpu in gpus])


def _check_visible(visible: str, known: list[str]) -> Iterator[Finding]:
    words = [word.strip() for word in visible.split(",") if word.strip()]
    unknown = [word for word in words if word.isdigit() and word not in known]
    if unknown:
        yield red("GPUs", f"CUDA_VISIBLE_DEVICES is {visible}, but the GPUs here are {', '.join(known)}",
                  "correct it, or unset it")  # fmt: skip
    elif not words or "-1" in words:
        yield yellow("GPUs", f"CUDA_VISIBLE_DEVICES is {visible!r}: it hides all of them", "unset it")


# --- compilers -------------------------------------------------------------------------------------------------------


def compilers(config: RunConfig | None, facts: MachineFacts) -> list[Finding]:
    """Look for what compiles kernels, and for what an interrupted build left behind."""
    variables = facts.environment
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{variables.get('CUDA_HOME', '/usr/local/cuda')}/bin")
    locks = build_locks(extensions_folder(variables))
    is_needed = config is not None and config.parallel.engine == "deepspeed"
    return [
        *find_compiler(config, facts),
        *check_nvcc(nvcc, variables.get("CUDA_HOME")),
        *environment.check_build_locks(locks, is_needed, facts.mounts),
    ]


def find_compiler(config: RunConfig | None, facts: MachineFacts) -> list[Finding]:
    """Look for what compiles kernels on the CPU."""
    compiler = shutil.which(facts.environment.get("CXX") or "g++") or shutil.which("c++") or shutil.which("clang++")
    compiles = (
        config is not None and config.trainer.torch_compile and config.trainer.torch_compile_backend == "inductor"
    )
    return [check_compiler(compiler, compiles)]


def check_compiler(compiler: str | None, is_needed: bool) -> Finding:
    """torch.compile and Triton need a C++ compiler; DeepSpeed's offloading does not: its optimizer is torch's."""
    if compiler:
        return green("C++ compiler", compiler)
    if is_needed:
        return red(
            "C++ compiler", "none, but trainer.torch_compile is true", "install g++, or set trainer.torch_compile false"
        )
    return green("C++ compiler", "none; only trainer.torch_compile and Triton need one")


def check_nvcc(nvcc: str | None, cuda_home: str | None) -> Iterator[Finding]:
    """Only extensions that are built here need nvcc, e.g. flash-attn; enc itself builds none."""
    if cuda_home and not Path(cuda_home).is_dir():
        yield yellow("CUDA_HOME", f"{cuda_home} does not exist", "correct it, or unset it")
    yield green("nvcc", nvcc or "none; only building flash-attn and the like needs it")
