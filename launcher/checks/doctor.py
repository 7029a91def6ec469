"""`enc doctor`: what is wrong on this machine, and with a config's run on it, before anything is queued.

All probes run at once, each on a thread with a time limit: one that fails or hangs is a line of the report, and its
thread is left behind. The disk is measured last, when nothing else reads.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any, Generic, TypeVar

from enc.encoder.config.schema import RunConfig
from enc.encoder.errors import EncError
from enc.launcher.backends.slurm import commands as slurm
from enc.launcher.backends.slurm import probe as probe_slurm
from enc.launcher.checks import probe_machine, probe_software, surroundings
from enc.launcher.checks.findings import Finding, green, red, yellow
from enc.launcher.checks.preflight import preflight
from enc.launcher.machine.facts import read_mounts
from enc.launcher.planning.cluster_defaults import with_cluster_defaults
from enc.launcher.planning.plan import choose_scheduler, make_plan, with_expected_vocabulary

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """How long a probe may take, in seconds."""

    probe: float
    torch: float  # its first import reads gigabytes
    slurm: float


FULL, QUICK = Limits(probe=12, torch=60, slurm=10), Limits(probe=3, torch=3, slurm=3)


@dataclass(frozen=True)
class Chapter:
    """A headed part of the report."""

    name: str
    findings: list[Finding]

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {"name": self.name, "findings": [finding.as_dict() for finding in self.findings]}


class Later(Generic[T]):
    """A call that runs on a thread of its own; the program may end while it still runs."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._value: list[T] = []
        self._error: Exception | None = None
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value.append(self._call())
        except Exception as error:
            self._error = error

    def get(self, timeout_s: float) -> T:
        """Return what the call returned, or raise what it raised; TimeoutError when it takes longer."""
        self._thread.join(timeout_s)
        if self._error is not None:
            raise self._error
        if not self._value:
            raise TimeoutError(f"no answer within {timeout_s:g} s")
        return self._value[0]


def diagnose(config: RunConfig | None, quick: bool) -> Iterator[Chapter]:
    """Look at this machine, and at a config's run on it; yield the parts of the report as they are known."""
    limits = QUICK if quick else FULL
    config = choose_scheduler(config, slurm.is_installed()) if config else None
    for_slurm = config is not None and config.launch.scheduler == "slurm"
    torch = Later(lambda: probe_software.ask_torch(limits.torch))
    gpus = Later(lambda: probe_software.read_gpus(limits.probe))
    looks: dict[str, list[Callable[[], list[Finding]]]] = {
        "Software": [probe_software.versions, lambda: _torch(torch, gpus, limits)],
        "GPUs": [lambda: _gpus(gpus.get(limits.probe + 0.5))],
        "Network": [lambda: _network(config, for_slurm), lambda: _of_torch(torch, limits, probe_software.check_nccl)],
        "Fast paths": [lambda: _of_torch(torch, limits, probe_software.check_fast_paths)],
        "Compilers": [lambda: probe_software.compilers(config)],
        "Machine": [probe_machine.machine_facts],
        "SLURM": [lambda: probe_slurm.slurm_facts(config, for_slurm, limits.slurm)],
        **({"This run": [lambda: run_findings(config, for_slurm)]} if config is not None else {"Caches": [_caches]}),
    }  # fmt: skip
    started = {name: [Later(look) for look in calls] for name, calls in looks.items()}
    longest = {"Software": limits.torch, "Network": limits.torch, "Fast paths": limits.torch, "SLURM": limits.slurm}
    said: set[Finding] = set()
    for name, calls in started.items():
        limit = longest.get(name, limits.probe) + 1  # a probe that knows its own limit says more
        found = dict.fromkeys(finding for call in calls for finding in _result(name, call, limit))
        new = [finding for finding in found if finding not in said]
        said |= found.keys()
        if new:
            yield Chapter(name, new)
    if not quick:
        folder = Path(config.trainer.output_dir if config else ".")
        speed = Later(lambda: probe_machine.disk_speed(folder, with_expected_vocabulary(config) if config else None))
        yield Chapter("Disk", _result("speed", speed, FULL.probe))


def _result(name: str, call: Later[list[Finding]], limit: float) -> list[Finding]:
    try:
        return call.get(limit)
    except TimeoutError as error:
        return [yellow(name, f"{error or 'no answer in time'}", "repeat it; what it looks at may hang")]
    except EncError as error:
        return [yellow(name, str(error), "")]
    except Exception as error:  # a probe meets machines that nobody has seen
        return [yellow(name, f"could not be looked at: {type(error).__name__}: {error}", "")]


def _torch(torch: Later[dict[str, Any]], gpus: Later[list[probe_software.GpuSeen]], limits: Limits) -> list[Finding]:
    try:
        facts = torch.get(limits.torch + 1)
    except TimeoutError as error:
        return [yellow("torch", str(error), "try again without --quick: a first import takes longest")]
    except EncError as error:
        return [red("torch", str(error), "install torch again; the last lines of `python -c 'import torch'` say more")]
    try:
        num_gpus = len(gpus.get(limits.probe + 0.5))
    except (EncError, OSError):  # said under GPUs
        num_gpus = 0
    return list(probe_software.check_torch(facts, num_gpus))


def _gpus(gpus: list[probe_software.GpuSeen]) -> list[Finding]:
    return list(probe_software.check_gpus(gpus, os.environ.get("CUDA_VISIBLE_DEVICES")))


def _of_torch(
    torch: Later[dict[str, Any]], limits: Limits, check: Callable[[dict[str, Any]], Iterator[Finding]]
) -> list[Finding]:
    try:
        return list(check(torch.get(limits.torch + 1)))
    except (EncError, OSError):  # said under Software
        return []


def _network(config: RunConfig | None, for_slurm: bool) -> list[Finding]:
    variables = {**os.environ, **(config.launch.env if config else {})}
    return list(
        probe_machine.check_network(probe_machine.read_interfaces(), probe_machine.read_fabrics(), variables, for_slurm)
    )


def _caches() -> list[Finding]:
    folders, mounts = surroundings.cache_folders(dict(os.environ)), read_mounts()
    found = list(surroundings.check_caches(folders, mounts))
    return found or [green("caches", "none on a network file system")]


def run_findings(config: RunConfig, for_slurm: bool) -> list[Finding]:
    """Return what the preflight of a config's run finds; a config that makes no plan is one red line."""
    try:
        plan = make_plan(_as_submitted(config) if for_slurm and slurm.is_installed() else config)
    except EncError as error:
        return [red("plan", str(error))]
    except OverflowError:
        return [red("plan", "a number of this run is too large to compute with", "lower it")]
    return preflight(plan, for_slurm)


def _as_submitted(config: RunConfig) -> RunConfig:
    """Return a config with what the cluster says of its nodes, if it says anything."""
    try:
        return with_cluster_defaults(config, lambda text: None)
    except EncError:  # said under SLURM
        return config
