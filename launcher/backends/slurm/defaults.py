"""What the cluster itself says of a run's nodes."""

from enc.encoder.config.schema import RunConfig
from enc.encoder.printable import Say
from enc.launcher.backends.slurm import commands as slurm


def with_cluster_defaults(config: RunConfig, say: Say) -> RunConfig:
    """Fill in what the cluster itself says: the GPUs of a node of the partition, or that it has none."""
    launch = config.launch
    if launch.nproc_per_node is not None or config.trainer.use_cpu or launch.slurm.gpu_request == "none":
        return config
    gpus = slurm.gpus_per_node(launch.slurm.partition)
    if gpus is None:
        return config
    where = f"partition {launch.slurm.partition}" if launch.slurm.partition else "this cluster"
    if gpus == 0:
        say(f"Nodes of {where} have no GPUs: the run uses their CPUs.")
        return config.changed({"trainer.use_cpu": True, "launch.nproc_per_node": 1})
    say(f"Nodes of {where} have {gpus} GPUs: one rank on each.")
    return config.changed({"launch.nproc_per_node": gpus})
