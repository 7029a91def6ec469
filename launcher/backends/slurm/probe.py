"""What `enc doctor` makes of SLURM, and of the job that it is called in.

A probe observes; what it makes of that is a function of what was observed, which tests call with other values.
"""

from collections.abc import Iterator, Mapping

from enc.encoder.config.launch_checks import time_limit_s
from enc.encoder.config.schema import RunConfig
from enc.encoder.errors import UsageError
from enc.launcher.backends.slurm import commands as slurm
from enc.launcher.checks.findings import Finding, green, red, yellow


def slurm_facts(config: RunConfig | None, environment: Mapping[str, str], timeout_s: float) -> list[Finding]:
    """Ask SLURM for its partitions, and compare the config with the allocation that this process is in."""
    for_slurm = config is not None and config.launch.scheduler == "slurm"
    if not slurm.is_installed():
        return [green("SLURM", "not installed here")]
    inside = list(check_allocation(config, for_slurm, environment))
    try:
        partitions = slurm.partitions(timeout_s)
    except UsageError as error:
        return [check_silence(str(error), for_slurm), *inside]
    return [*check_partitions(partitions, config if for_slurm else None), *inside]


def check_silence(error: str, for_slurm: bool) -> Finding:
    """SLURM's commands are here, but nobody answers them."""
    level = red if for_slurm else yellow
    if "configuration source" in error:
        fix = "log in to a machine of the cluster, or set SLURM_CONF to its slurm.conf"
        return level("SLURM", "its commands are installed, but this machine belongs to no cluster: no slurm.conf", fix)
    if "Unable to contact slurm controller" in error:
        error = "its controller cannot be reached (sinfo: Unable to contact slurm controller)"
    return level("SLURM", error, "`scontrol ping` tells more; ask the cluster's administrators")


def check_partitions(partitions: list[slurm.Partition], config: RunConfig | None) -> Iterator[Finding]:
    """The partition that a job of this config goes to must be there, be up, and have enough nodes and time."""
    asked = config.launch.slurm.partition if config else None
    names = asked.split(",") if asked else []
    for one in partitions:
        if not names or one.name in names:
            is_used = one.name in names or (not names and one.is_default)
            yield _check_partition(one, config if is_used else None)
    known = [one.name for one in partitions]
    missing = [name for name in names if name not in known]
    if missing:
        yield red("partition", f"launch.slurm.partition {', '.join(missing)} does not exist for you",
                  f"use one of {', '.join(known)}")  # fmt: skip
    if not known:
        yield yellow("partition", "SLURM shows none", "ask the cluster's administrators for access")


def _check_partition(one: slurm.Partition, config: RunConfig | None) -> Finding:
    """Check the partition of a job; without a config only say what it offers."""
    has_limit = one.time_limit[:1].isdigit()
    limit = f"time limit {one.time_limit}" if has_limit else "no time limit"
    nodes = f"{one.num_nodes:,} node{'' if one.num_nodes == 1 else 's'}, {one.idle_nodes:,} idle"
    text = f"{one.name}{', the default' if one.is_default else ''}: {limit}, {nodes}"
    asked = config.launch.slurm.time if config else None
    available = time_limit_s(one.time_limit) if has_limit else None
    if config and one.num_nodes < config.launch.num_nodes:
        return red("partition", f"{text}, but launch.nodes is {config.launch.num_nodes}",
                   "fewer nodes, or another launch.slurm.partition")  # fmt: skip
    if asked and available and (time_limit_s(asked) or available + 1) > available:
        return red("partition", f"{text}, but launch.slurm.time is {asked}: the job would never start",
                   "a shorter launch.slurm.time; a run takes as many jobs as it needs")  # fmt: skip
    if one.state != "up":
        return yellow("partition", f"{text}, {one.state}", "jobs wait until it is up; choose another one")
    return green("partition", text)


def check_allocation(config: RunConfig | None, for_slurm: bool, variables: Mapping[str, str]) -> Iterator[Finding]:
    """Inside a job, a run that starts here should use what the job has: nodes, and ranks on each."""
    job = variables.get("SLURM_JOB_ID")
    if job is None:
        return
    nodes = _number(variables, "SLURM_JOB_NUM_NODES") or _number(variables, "SLURM_NNODES")
    ranks = _number(variables, "SLURM_GPUS_ON_NODE") or _number(variables, "SLURM_NTASKS_PER_NODE")
    has = f"job {job} has {_counted(nodes, 'node')}" + (f" with {_counted(ranks, 'GPU or task')} each" if ranks else "")
    yield green("allocation", f"this is inside SLURM: {has}")
    if config is None or for_slurm:  # a job of its own
        return
    for key, asked, there in (
        ("launch.nodes", config.launch.num_nodes, nodes),
        ("launch.nproc_per_node", config.launch.nproc_per_node, ranks),
    ):
        if asked and there and asked > there:
            yield red("allocation", f"{key} is {asked}, but {has}", f"set {key} {there}, or ask for a larger job")
        elif asked and there and asked < there:
            yield yellow("allocation", f"{key} is {asked}, but {has}: the rest is idle", f"set {key} {there}")


def _number(variables: Mapping[str, str], name: str) -> int | None:
    text = variables.get(name, "")
    return int(text) if text.isdigit() else None


def _counted(number: int | None, noun: str) -> str:
    return f"{number or '?'} {noun}{'' if number == 1 else 's'}"
