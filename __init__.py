"""enc: pretrain text encoders, from one laptop CPU to a SLURM cluster."""

__version__ = "0.1.0"
