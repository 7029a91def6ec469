"""How the rows of one step are spread over ranks and microbatches (no torch)."""

from dataclasses import dataclass

from enc.encoder.errors import UsageError
from enc.encoder.run.config import TrainerConfig


@dataclass(frozen=True)
class BatchSplit:
    """The rows of one step: rank x microbatch x row."""

    world_size: int
    accumulation: int
    rows_per_microbatch: int

    @property
    def rows_per_step(self) -> int:
        return self.world_size * self.accumulation * self.rows_per_microbatch


def split_batch(trainer: TrainerConfig, world_size: int) -> BatchSplit:
    """Spread the global batch over ranks and microbatches.

    The microbatch is the largest divisor of a rank's share that does not exceed `per_device_train_batch_size`. Raises
    UsageError when the global batch does not divide by the number of ranks.
    """
    total = trainer.global_batch_size or (
        trainer.per_device_train_batch_size * trainer.gradient_accumulation_steps * world_size
    )
    if total % world_size:
        fitting = [str(n) for n in range(1, min(total, 4 * world_size) + 1) if total % n == 0]
        raise UsageError(
            f"trainer.global_batch_size is {total} rows, which do not divide over {world_size} ranks. "
            f"Use {', '.join(fitting)} ranks, or another global batch in a new run."
        )
    per_rank = total // world_size
    rows = next(d for d in range(min(trainer.per_device_train_batch_size, per_rank), 0, -1) if per_rank % d == 0)
    return BatchSplit(world_size, per_rank // rows, rows)
