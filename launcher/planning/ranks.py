"""How many ranks a machine of a run has, what they run on, and which scheduler starts them. Pure."""

from enc.encoder.config.launch import SlurmConfig
from enc.encoder.config.schema import RunConfig
from enc.encoder.errors import UsageError
from enc.encoder.gpus import find_gpu
from enc.launcher.machine.facts import MachineFacts


def choose_scheduler(config: RunConfig, facts: MachineFacts) -> RunConfig:
    """Return the config with `launch.scheduler` resolved: SLURM for what names nodes, a site or SLURM settings.

    One node stays one node where there is no SLURM: the run then starts on this machine.
    """
    launch = config.launch
    if launch.scheduler == "local" and launch.num_nodes > 1:
        raise UsageError(
            f"launch.scheduler is local, but launch.nodes is {launch.nodes}: this machine is one. Add --nodes 1, with "
            "--nproc-per-node for the ranks that you want here."
        )
    if launch.scheduler != "auto":
        return config
    asks = launch.site is not None or launch.slurm != SlurmConfig()
    nodes = launch.num_nodes > 1 or (launch.nodes is not None and facts.has_slurm)
    return config.changed({"launch.scheduler": "slurm" if asks or nodes else "local"})


def usable_gpus(config: RunConfig, facts: MachineFacts) -> int:
    """Return how many GPUs of this machine a run may use."""
    return 0 if config.trainer.use_cpu else facts.num_gpus


def device_of(config: RunConfig, facts: MachineFacts) -> str:
    """Return what the ranks run on: cuda or cpu. The nodes of a cluster have GPUs unless the config says otherwise."""
    if config.launch.scheduler == "slurm":
        return "cpu" if config.trainer.use_cpu else "cuda"
    return "cuda" if usable_gpus(config, facts) else "cpu"


def ranks_per_node(config: RunConfig, facts: MachineFacts) -> int:
    """Return the processes on one machine: as the config says, or one a GPU of this one, or one.

    Raises UsageError for a job on a cluster that does not say how many GPUs its machines have.
    """
    if config.launch.scheduler == "slurm":
        return ranks_of_job(config)
    return config.launch.nproc_per_node or max(usable_gpus(config, facts), 1)


def ranks_of_job(config: RunConfig) -> int:
    """Return the ranks on each node of a job. Raises UsageError when GPUs are asked for and nothing says how many."""
    launch = config.launch
    if launch.nproc_per_node:
        return launch.nproc_per_node
    if config.trainer.use_cpu or launch.slurm.gpu_request == "none":
        return 1
    raise UsageError(
        "How many GPUs a node has is not known: give --gpus-per-node N (launch.nproc_per_node), or a site that says it "
        "(--site NAME; `enc config sites` lists them). For a run on CPUs set trainer.use_cpu true."
    )


def device_bytes(config: RunConfig, ranks: int, facts: MachineFacts) -> int | None:
    """Return the memory that one of so many ranks on a machine has: its GPU's, or its share of the RAM.

    None when it cannot be found out, as for the machines of a cluster whose GPUs `launch.gpu` does not name.
    """
    if config.launch.gpu is not None and not config.trainer.use_cpu:
        return find_gpu(config.launch.gpu).bytes
    if config.launch.scheduler == "slurm" and facts.slurm_job is None:
        return None
    return facts.gpu_bytes if usable_gpus(config, facts) else facts.ram_bytes // ranks
