"""A config as it is submitted: with what the cluster says of itself."""

from collections.abc import Callable

from enc.encoder.config.schema import RunConfig
from enc.encoder.engine.settings import engine_name
from enc.launcher.backends.slurm import commands as slurm
from enc.launcher.machine.devices import device_bytes
from enc.launcher.planning.plan import Plan, self_contained

Say = Callable[[str], None]


def submitted_config(plan: Plan) -> RunConfig:
    """Return the config that a job starts from.

    What is not known here is left to the job: text that is not tokenised yet keeps its place, relative to the job's
    working folder, and `auto` stays the engine where the memory of the nodes' GPUs is not given.
    """
    updates = {"trainer.output_dir": str(plan.run_dir), "launch.site": None}
    if plan.asked_engine == "auto" and device_bytes(plan.config, 1) is None:
        updates["parallel.engine"] = "auto"
    if plan.store_ready:
        return self_contained(plan).changed(updates)
    return plan.config.changed(updates | {"dataset.pre_tokenize_output": str(plan.store)})


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


def told(plan: Plan, job: str) -> str:
    nodes, ranks = plan.config.launch.num_nodes, plan.config.launch.nproc_per_node
    return (
        f"Job {job} is queued: {nodes} node{'s' if nodes > 1 else ''} x {ranks} rank{'s' if ranks != 1 else ''}, "
        f"{engine_name(plan.config)}, in {plan.run_dir}.\nWatch it with `enc status {job}` and `enc logs -f {job}`; "
        f"`enc cancel {job}` ends it."
    )
