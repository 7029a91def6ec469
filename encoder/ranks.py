"""The processes of a run, and the few things they say to each other on the CPU."""

import datetime
import os
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from enc.encoder.errors import EncError, PeerError, RunError

_TIMEOUT = datetime.timedelta(minutes=30)


@dataclass(frozen=True)
class Ranks:
    """This process among its peers; a single process needs no process group."""

    rank: int
    world_size: int
    local_rank: int
    group: dist.ProcessGroup | None = None

    @classmethod
    def join(cls, use_cuda: bool, needs_group: bool = False) -> "Ranks":
        """Read the place of this process from the environment (torchrun's names) and join the others.

        `needs_group` asks for a process group even for a single process.
        """
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if world_size > 1 or needs_group:
            backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
            dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=_TIMEOUT)
        return cls(rank, world_size, local_rank)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def separate(self) -> "Ranks":
        """Return the same ranks with a process group of their own, for use on another thread; collective."""
        group = dist.new_group(backend="gloo", timeout=_TIMEOUT) if self.world_size > 1 else None
        return replace(self, group=group)

    def sum(self, *values: float | Tensor) -> list[float]:
        """Add numbers, or tensors of one number, over all ranks in fp64; every rank gets the same sums."""
        totals = torch.tensor(values, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(totals, group=self.group)
        return totals.tolist()

    def any(self, flag: bool) -> bool:
        """Tell whether the flag is set on any rank."""
        return self.sum(float(flag))[0] > 0

    def barrier(self) -> None:
        self.sum(0.0)

    def from_main(self, value: Any) -> Any:
        """Give every rank what rank 0 has."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group, device=torch.device("cpu"))
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Give every rank what each rank has, in rank order."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def agree(self, error: Exception | None) -> None:
        """Raise on every rank when any rank failed, so that none waits for ever. A barrier otherwise."""
        if not self.any(error is not None):
            return
        texts = self.gather(None if error is None else str(error))
        if error is not None:
            raise error if isinstance(error, EncError) else RunError(f"{type(error).__name__}: {error}") from error
        rank, text = next((rank, text) for rank, text in enumerate(texts) if text is not None)
        raise PeerError(f"On rank {rank}: {text}")


# What gloo says when a process on the other side of a connection is gone.
_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "Socket Timeout")


def is_lost_peer(error: BaseException) -> bool:
    """Tell whether an error only says that another rank failed or vanished, and nothing of this one."""
    if isinstance(error, PeerError | dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _GONE)
