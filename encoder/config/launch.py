"""The config section `launch`: where processes start, how SLURM is asked, what happens when a run is interrupted."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from enc.encoder.section import Bool, Count, Line, PositiveFloat, PositiveInt, Section


def _digits(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _sbatch_option(value: str) -> str:
    if not re.fullmatch(r"--[a-z][a-z-]*(=.*)?", value):
        raise ValueError("must be one option with two dashes, e.g. --switches=1")
    return value


def _srun_option(value: str) -> str:
    if not re.fullmatch(r"--[a-z][a-z-]*(=.*)?|-[A-Za-z]\S*", value):
        raise ValueError("must be one option in one word, e.g. --cpu-bind=cores")
    return value


SbatchOption = Annotated[Line, AfterValidator(_sbatch_option)]
SrunOption = Annotated[Line, AfterValidator(_srun_option)]
_TIME_LIMIT = r"^[0-9]+(:[0-9]{1,2}){0,2}$|^[0-9]+-[0-9]{1,2}(:[0-9]{1,2}){0,2}$"


class SlurmConfig(Section):
    """How SLURM is asked for a job. A site profile (`launch.site`) fills in what a cluster always wants."""

    partition: Line | None = None
    """Partition, or several with commas."""
    account: Line | None = None
    """Account that pays."""
    qos: Line | None = None
    """Quality of service."""
    constraint: Line | None = None
    """Features that nodes must have."""
    reservation: Line | None = None
    """Reservation to run in."""
    time: Annotated[str, BeforeValidator(_digits), Field(pattern=_TIME_LIMIT)] | None = None
    """Time limit of one job: minutes, HH:MM:SS or D-HH:MM:SS. A run may take many; the partition's limit by default."""
    gpu_request: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    """How GPUs are asked for; `none` where a partition gives whole nodes. CPU runs never ask."""
    gpu_type: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")] | None = None
    """Type in the request for GPUs, e.g. `h100`."""
    cpus_per_task: PositiveInt | None = None
    """Cores for each rank."""
    mem: Annotated[str, BeforeValidator(_digits), Field(pattern=r"^[0-9]+[KMGT]?$")] | None = None
    """Memory of a node, e.g. `480G`; `0` is all of it."""
    exclusive: Bool = False
    """Ask for whole nodes."""
    exclude: list[Line] = []
    """Nodes to stay away from; those that failed are added by themselves."""
    after: Annotated[str, BeforeValidator(_digits), Field(pattern=r"^[0-9]+$")] | None = None
    """Start when this job has ended, whatever became of it."""
    continue_by: Literal["requeue", "resubmit", "array"] = "requeue"
    """How a run gets its next job: the same job is requeued; a new one is submitted from inside the old one; or all are
    submitted at once as an array that runs one task at a time."""
    array_size: Annotated[int, Field(ge=2)] = 10
    """Jobs of the array, with `continue_by: array`."""
    signal_s: Annotated[int, Field(gt=0, le=65535)] = 120
    """Seconds before the time limit at which SLURM itself gives a warning; the run stops earlier when its measured
    times ask for it."""
    directives: list[SbatchOption] = []
    """Further `#SBATCH` options, e.g. `--switches=1`; each is one option with its value as it is, without quotes."""
    rejected: list[Annotated[Line, Field(pattern=r"^--[a-z-]+$")]] = []
    """Options that this site does not allow; they are left out of scripts."""
    srun: list[SrunOption] = []
    """Further options of `srun`, e.g. `--cpu-bind=cores`; each is one word."""


class ContainerConfig(Section):
    """The container that ranks run in."""

    kind: Literal["none", "pyxis", "apptainer"] = "none"
    """Runtime: `pyxis` (srun --container-image) or `apptainer`."""
    image: Line | None = None
    """Image: a name or .sqsh file for pyxis, a .sif file or name for apptainer."""
    mounts: list[Line] = []
    """Folders to mount, `host:container`; the run folder, token store and working folder are mounted by themselves."""
    args: list[Line] = []
    """Further options of the runtime."""
    python: Line = "python3"
    """Python inside the container that has `enc`."""


class RestartsConfig(Section):
    """How often a run that was interrupted is started again, by cause. Config errors and `scancel` never restart it."""

    same_step: PositiveInt = 3
    """Attempts in a row that may end without getting further than those before; after them the run stops. Twice as many
    when processes, nodes or their starts failed."""
    crash: Count = 5
    """Restarts after an error of the training process."""
    lost_rank: Count = 20
    """Restarts after a process was killed or a node failed."""
    hang: Count = 10
    """Restarts after no rank had made progress for `launch.hang_timeout_s`."""


class LaunchConfig(Section):
    """Where the processes of a run start, and what happens when they are interrupted."""

    scheduler: Literal["auto", "local", "slurm"] = "auto"
    """`auto` submits to SLURM when several nodes, a site or any `launch.slurm` key is asked for, else starts here."""
    site: Line | None = None
    """Site profile: a name (`enc config sites` lists them) or a YAML file; its values are defaults of this section."""
    nodes: PositiveInt | None = None
    """Number of machines; one by default."""
    nproc_per_node: PositiveInt | None = None
    """Processes (ranks) on a machine; by default one a GPU, or one without GPUs."""
    gpu: Line | None = None
    """Kind of GPU on the machines, as `enc plan --gpu` names it; with it memory is checked before a job is queued."""
    modules: list[Line] = []
    """Environment modules to load."""
    setup: list[Line] = []
    """Shell lines to run before the job starts, e.g. to source a file."""
    env: dict[str, str] = {}
    """Environment variables of all processes of a job. Values are taken as they are: `$HOME` is not replaced."""
    python: Line | None = None
    """Python of the compute nodes that has `enc`; by default the one that runs this command."""
    snapshot_code: Bool = False
    """Copy `enc` itself into the run folder and run the copy, so that later edits do not reach a requeued job."""
    hang_timeout_s: PositiveFloat = 1800.0
    """Seconds without progress on any rank after which a job's processes are killed and started again."""
    heartbeat_s: PositiveFloat = 5.0
    """Seconds between two notes of a rank about what it is doing."""
    max_excluded_nodes: Count = 4
    """Failing nodes that a run may exclude by itself."""
    slurm: SlurmConfig = SlurmConfig()
    container: ContainerConfig = ContainerConfig()
    restarts: RestartsConfig = RestartsConfig()

    @property
    def num_nodes(self) -> int:
        return self.nodes or 1

    @property
    def on_cluster(self) -> bool:
        """Whether the ranks run on machines that a scheduler gives, not on this one."""
        return self.scheduler not in ("auto", "local")

    @property
    def asks_for_gpus(self) -> bool:
        """Whether a job says how many GPUs it wants; partitions that give whole nodes are not asked."""
        return self.slurm.gpu_request != "none"
