"""enc: pretrain text encoders, from one laptop CPU to a SLURM cluster."""

from enc.launcher.api import *  # noqa: F403  # the names that it lists

__version__ = "0.1.0"

# The folders that are installed, checked by mypy and copied by `launch.snapshot_code`: the one list of them.
ROOMS = ("launcher", "tools", "encoder", "kernels", "ds_configs", "slurm")
