"""The config section `parallel`."""

from typing import Annotated, Any, Literal

from pydantic import Field

from enc.encoder.section import Bool, PositiveInt, Section


class ParallelConfig(Section):
    """How a step is spread over ranks."""

    engine: Literal["auto", "ddp", "fsdp", "deepspeed"] = "auto"
    """`ddp` keeps a whole copy of the model on each rank, `fsdp` and `deepspeed` shard it; `auto` chooses when a run
    starts, by the model's size, the memory of a device and the number of ranks."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 2
    """DeepSpeed: what is sharded over ranks. 0 nothing, 1 the moments, 2 the gradients too, 3 the weights too."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What lives in CPU memory: `optimizer` the moments and fp32 weights (ZeRO 1 to 3), `parameters` all of the state
    (ZeRO 3, FSDP)."""
    replicate: PositiveInt = 1
    """FSDP: groups of ranks that each hold a whole sharded model (hybrid sharding); must divide the number of ranks."""
    reshard_after_forward: Bool = True
    """FSDP: free a block's gathered weights after its forward pass; `false` keeps them for the backward pass."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """FSDP, DeepSpeed: arithmetic in which gradients are summed over ranks."""
    bucket_size: PositiveInt = 50_000_000
    """DeepSpeed: elements that are reduced or gathered at a time."""
    deepspeed_config: str | dict[str, Any] | None = None
    """DeepSpeed: a JSON file (or its contents) merged into what `enc render deepspeed` writes; its `auto` values are
    filled in."""
    activation_checkpointing: Literal["full", "selective"] = "full"
    """With `trainer.gradient_checkpointing`: recompute whole blocks, or all but matrix products and attention."""
    activation_checkpointing_every: PositiveInt = 1
    """With `trainer.gradient_checkpointing`: recompute every so many-th block."""
