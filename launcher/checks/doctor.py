"""`enc doctor`: what is wrong on this machine, and with a config's run on it, before anything is queued.

All probes run at once, each on a thread with a time limit: one that fails or hangs is a line of the report, and its
thread is left behind. The disk is measured last, when nothing else reads.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, Generic, TypeVar

from enc.encoder.config.schema import RunConfig
from enc.encoder.errors import EncError
from enc.launcher.checks import environment, probe_machine, probe_software
from enc.launcher.checks.findings import Finding, green, red, yellow
from enc.launcher.checks.preflight import PlaceChecks, preflight
from enc.launcher.machine.facts import MachineFacts
from enc.launcher.machine.gpus import InstalledGpu
from enc.launcher.planning.plan import plan_run, with_expected_vocabulary

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """How long a probe may take, in seconds."""

    probe: float
    torch: float  # its first import reads gigabytes
    scheduler: float


FULL, QUICK = Limits(probe=12, torch=60, scheduler=10), Limits(probe=3, torch=3, scheduler=3)


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


Probe = Callable[[], list[Finding]]


@dataclass(frozen=True)
class Asked:
    """What the doctor is to look at beside the machine: a config, whose run has its own checks, and the schedulers."""

    config: RunConfig | None
    for_nodes: bool  # the run is for other machines than this one
    schedulers: Mapping[str, Callable[[float], list[Finding]]]  # by what people call them; each takes its time limit
    run: Probe | None


def diagnose(asked: Asked, facts: MachineFacts, limits: Limits) -> Iterator[Chapter]:
    """Look at this machine, and at a config's run on it; yield the parts of the report as they are known."""
    config = asked.config
    torch = Later(lambda: probe_software.ask_torch(limits.torch))
    gpus = Later(lambda: facts.gpus)
    probes: dict[str, list[Probe]] = {
        "Software": [probe_software.versions, lambda: _torch(torch, gpus, limits)],
        "GPUs": [lambda: _gpus(gpus.get(limits.probe + 0.5), facts)],
        "Network": [lambda: _network(asked, facts), lambda: _of_torch(torch, limits, probe_software.check_nccl)],
        "Fast paths": [lambda: _of_torch(torch, limits, probe_software.check_fast_paths)],
        "Compilers": [lambda: probe_software.compilers(config, facts)],
        "Machine": [lambda: probe_machine.check_machine(facts)],
        **{title: [partial(probe, limits.scheduler)] for title, probe in asked.schedulers.items()},
        **({"This run": [asked.run]} if asked.run else {"Caches": [lambda: _caches(facts)]}),
    }  # fmt: skip
    started = {name: [Later(probe) for probe in calls] for name, calls in probes.items()}
    longest = dict.fromkeys(("Software", "Network", "Fast paths"), limits.torch)
    longest |= dict.fromkeys(asked.schedulers, limits.scheduler)
    reported: set[Finding] = set()
    for name, calls in started.items():
        limit = longest.get(name, limits.probe) + 1  # a probe that knows its own limit says more
        found = dict.fromkeys(finding for call in calls for finding in _result(name, call, limit))
        new = [finding for finding in found if finding not in reported]
        reported |= found.keys()
        if new:
            yield Chapter(name, new)
    if limits is not QUICK:
        yield Chapter("Disk", _result("speed", Later(lambda: _disk(config, facts)), FULL.probe))


def _result(name: str, call: Later[list[Finding]], limit: float) -> list[Finding]:
    try:
        return call.get(limit)
    except TimeoutError as error:
        return [yellow(name, f"{error or 'no answer in time'}", "repeat it; what it looks at may hang")]
    except EncError as error:
        return [yellow(name, str(error), "")]
    except Exception as error:  # a probe meets machines that nobody has seen
        return [yellow(name, f"could not be looked at: {type(error).__name__}: {error}", "")]


def _torch(torch: Later[dict[str, Any]], gpus: Later[list[InstalledGpu]], limits: Limits) -> list[Finding]:
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


def _gpus(gpus: list[InstalledGpu], facts: MachineFacts) -> list[Finding]:
    return list(probe_software.check_gpus(gpus, facts.environment.get("CUDA_VISIBLE_DEVICES")))


def _of_torch(
    torch: Later[dict[str, Any]], limits: Limits, check: Callable[[dict[str, Any]], Iterator[Finding]]
) -> list[Finding]:
    try:
        return list(check(torch.get(limits.torch + 1)))
    except (EncError, OSError):  # said under Software
        return []


def _network(asked: Asked, facts: MachineFacts) -> list[Finding]:
    variables = {**facts.environment, **(asked.config.launch.env if asked.config else {})}
    interfaces, fabrics = probe_machine.read_interfaces(), probe_machine.read_fabrics()
    return list(probe_machine.check_network(interfaces, fabrics, variables, asked.for_nodes))


def _caches(facts: MachineFacts) -> list[Finding]:
    found = list(environment.check_caches(environment.cache_folders(facts.environment), facts.mounts))
    return found or [green("caches", "none on a network file system")]


def _disk(config: RunConfig | None, facts: MachineFacts) -> list[Finding]:
    folder = Path(config.trainer.output_dir if config else ".")
    return probe_machine.disk_speed(folder, with_expected_vocabulary(config) if config else None, facts)


def run_findings(config: RunConfig, facts: MachineFacts, checks_of_place: PlaceChecks) -> list[Finding]:
    """Return what the checks before a launch of a config find; a config that makes no plan is one red line."""
    try:
        plan = plan_run(config, facts)
    except EncError as error:
        return [red("plan", str(error))]
    except OverflowError:
        return [red("plan", "a number of this run is too large to compute with", "lower it")]
    return [*preflight(plan, facts), *checks_of_place(plan, facts)]
