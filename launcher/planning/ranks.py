"""How many ranks a machine of a run has, what they run on, and what each of them has. Pure."""

from enc.encoder.config.schema import RunConfig
from enc.encoder.errors import UsageError
from enc.encoder.gpus import find_gpu
from enc.encoder.printable import Say
from enc.launcher.machine.facts import MachineFacts

_GPUS_OF_A_NODE = 8


def usable_gpus(config: RunConfig, facts: MachineFacts) -> int:
    """Return how many GPUs of this machine a run may use."""
    return 0 if config.trainer.use_cpu else facts.num_gpus


def device_of(config: RunConfig, facts: MachineFacts) -> str:
    """Return what the ranks run on: cuda or cpu. The nodes of a cluster have GPUs unless the config says otherwise."""
    if config.launch.on_cluster:
        return "cpu" if config.trainer.use_cpu else "cuda"
    return "cuda" if usable_gpus(config, facts) else "cpu"


def ranks_per_node(config: RunConfig, facts: MachineFacts) -> int:
    """Return the processes on one machine: as the config says, or one a GPU of this one, or one.

    Raises UsageError for a job on a cluster that does not say how many GPUs its machines have.
    """
    if config.launch.on_cluster:
        return ranks_of_job(config)
    return config.launch.nproc_per_node or max(usable_gpus(config, facts), 1)


def ranks_of_job(config: RunConfig) -> int:
    """Return the ranks on each node of a job. Raises UsageError when GPUs are asked for and nothing says how many."""
    launch = config.launch
    if launch.nproc_per_node:
        return launch.nproc_per_node
    if config.trainer.use_cpu or not launch.asks_for_gpus:
        return 1
    raise UsageError(
        "How many GPUs a node has is not known: give --gpus-per-node N (launch.nproc_per_node), or a site that says it "
        "(--site NAME; `enc config sites` lists them). For a run on CPUs set trainer.use_cpu true."
    )


def with_assumed_gpus(config: RunConfig, say: Say) -> RunConfig:
    """Return the config of a job that is only looked at: where nothing says how many GPUs a node has, it is eight."""
    launch = config.launch
    if not launch.on_cluster or launch.nproc_per_node or config.trainer.use_cpu or not launch.asks_for_gpus:
        return config
    say(
        f"Note: how many GPUs a node has is not known here: {_GPUS_OF_A_NODE} are assumed. --gpus-per-node N says it, "
        "or a site (--site NAME)."
    )
    return config.changed({"launch.nproc_per_node": _GPUS_OF_A_NODE})


def device_bytes(config: RunConfig, ranks: int, facts: MachineFacts) -> int | None:
    """Return the memory that one of so many ranks on a machine has: its GPU's, or its share of the RAM.

    None when it cannot be found out, as for the machines of a cluster whose GPUs `launch.gpu` does not name.
    """
    if config.launch.gpu is not None and not config.trainer.use_cpu:
        return find_gpu(config.launch.gpu).bytes
    if config.launch.on_cluster and facts.job is None:
        return None
    return facts.gpu_bytes if usable_gpus(config, facts) else facts.ram_bytes // ranks
