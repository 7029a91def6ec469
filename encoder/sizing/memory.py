"""Bytes that one rank holds, by engine and number of ranks, from the config alone (no torch).

`static_bytes` is what lives between two steps; tests compare it with every tensor that the real engines hold.
`step_bytes` is what a step adds at its peak: an estimate, on the safe side, since not all of it is there at once.

Legend: P parameters, W ranks, R groups of ranks with a whole sharded model each (hybrid sharding).
Where the numbers come from: DeepSpeed 0.19.8, `runtime/zero/stage_1_and_2.py`, `stage3.py`, `bf16_optimizer.py`; FSDP2.
"""

from dataclasses import dataclass, fields
from math import ceil, prod

from enc.encoder.config.schema import RunConfig
from enc.encoder.models.architecture import Shape
from enc.encoder.models.registry import architecture_of
from enc.encoder.optim.state_spec import num_bytes, state_spec
from enc.encoder.sizing.sizes import block_parameters, num_parameters, parameter_shapes, states_per_token

_PERSISTENT = 100_000  # DeepSpeed's stage3_param_persistence_threshold: smaller parameters are never sharded
_ALLREDUCE_ELEMENTS = 500_000_000  # at most so many gradients are copied together when ZeRO 0 and 1 sum them
_LOGIT_BLOCK_BYTES = 2**27  # at most; of kernels/masked_ce_torch.py


@dataclass(frozen=True)
class StaticBytes:
    """What a rank holds between two steps; `host_` parts are in CPU memory, where the rest is on the device."""

    weights: int = 0  # what the forward pass reads
    master_weights: int = 0  # fp32 copy that the optimizer updates
    gradients: int = 0
    moments: int = 0  # what the optimizer keeps beside weights
    buffers: int = 0
    host_state: int = 0  # weights, master weights, gradients and moments that were offloaded
    host_buffers: int = 0

    @property
    def device(self) -> int:
        return self.weights + self.master_weights + self.gradients + self.moments + self.buffers

    @property
    def host(self) -> int:
        return self.host_state + self.host_buffers


@dataclass(frozen=True)
class StepBytes:
    """What a step adds on the device at its peak."""

    gradients: int  # where they do not live between steps
    copies: int  # of weights: gathered from other ranks, or cast to bf16
    buckets: int  # gradients on their way to other ranks
    activations: int
    loss: int

    @property
    def device(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def static_bytes(config: RunConfig, world_size: int) -> StaticBytes:
    """Return what a rank holds between two steps; `parallel.engine` must be a real one, not `auto`.

    Two things are left out: what the user's own DeepSpeed JSON changes, and a second copy of a rank's gradients in CPU
    memory, which ZeRO 1 and 2 with offloading keep in fp32 when they accumulate.
    """
    match config.parallel.engine:
        case "ddp":
            return _ddp_static(config, world_size)
        case "fsdp":
            return _fsdp_static(config, world_size)
        case "deepspeed" if config.parallel.zero_stage == 3:
            return _zero3_static(config, world_size)
        case "deepspeed":
            return _zero_static(config, world_size)
    raise ValueError(f"parallel.engine is {config.parallel.engine!r}; resolve it with choose_engine first")


def step_bytes(config: RunConfig, world_size: int, rows: int) -> StepBytes:
    """Estimate what a step adds at its peak, with microbatches of `rows` rows."""
    params = num_parameters(config)
    return StepBytes(
        gradients=_step_gradients(config, world_size, params),
        copies=_weight_copies(config, params),
        buckets=_buckets(config, params),
        activations=_activations(config, rows),
        loss=_loss(config, rows),
    )


def peak_parts(config: RunConfig, world_size: int, rows: int) -> dict[str, int]:
    """Return the estimated peak of one device by part; `host` is beside it, in CPU memory."""
    held, added = static_bytes(config, world_size), step_bytes(config, world_size, rows)
    return {
        "weights": held.weights + held.master_weights + added.copies,
        "gradients": held.gradients + added.gradients,
        "moments": held.moments,
        "buffers": held.buffers + added.buckets,
        "activations": added.activations,
        "loss": added.loss,
        "host": held.host,
    }


def peak_bytes(config: RunConfig, world_size: int, rows: int) -> int:
    """Return the estimated peak of one device."""
    return static_bytes(config, world_size).device + step_bytes(config, world_size, rows).device


def largest_rows(config: RunConfig, world_size: int, available: float) -> int:
    """Return the most rows of a microbatch that fit into `available` bytes of a device; 0 when not even one does."""
    if peak_bytes(config, world_size, 1) > available:
        return 0
    low, high = 1, 2
    while peak_bytes(config, world_size, high) <= available:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if peak_bytes(config, world_size, middle) <= available else (low, middle)
    return low


def low_precision(config: RunConfig) -> bool:
    """Tell whether the engine keeps its weights in bf16 beside fp32 master weights."""
    parallel = config.parallel
    return parallel.engine == "deepspeed" and parallel.zero_stage >= 1 and config.trainer.bf16


# --- between steps ---------------------------------------------------------------------------------------------------


def _moments(config: RunConfig) -> dict[str, Shape]:
    """Return the shapes of what the optimizer keeps, by name."""
    return state_spec(config.optimizer, config.parameters).kept(parameter_shapes(config))


def _ddp_static(config: RunConfig, world_size: int) -> StaticBytes:
    whole = 4 * num_parameters(config)
    # Gradients are views of DDP's buckets, which stay; one rank has none and frees its gradients.
    return StaticBytes(weights=whole, gradients=whole if world_size > 1 else 0, moments=num_bytes(_moments(config)))


def _fsdp_static(config: RunConfig, world_size: int) -> StaticBytes:
    shards = world_size // config.parallel.replicate
    weights, moments = (_own_rows(s, shards) for s in (parameter_shapes(config), _moments(config)))
    if config.parallel.offload == "parameters":
        return StaticBytes(host_state=weights + moments)
    return StaticBytes(weights=weights, moments=moments)


def _own_rows(shapes: dict[str, Shape], shards: int) -> int:
    """Return the bytes of the first rank: each tensor is cut along its first axis, and it has the larger part."""
    return num_bytes({name: (ceil(shape[0] / shards), *shape[1:]) for name, shape in shapes.items()})


def _zero_static(config: RunConfig, world_size: int) -> StaticBytes:
    """ZeRO 0 to 2: whole weights on each rank, from 1 on beside a flat fp32 partition with its moments."""
    params, width = num_parameters(config), 2 if low_precision(config) else 4
    if config.parallel.zero_stage == 0:
        return StaticBytes(weights=4 * params, moments=num_bytes(_moments(config)))
    own = _partition(params, world_size)
    params = own * world_size
    moments = 4 * sum(_partition(count, world_size) for count in _elements_by_kind(config).values())
    if config.parallel.offload == "optimizer":
        largest = max(prod(shape) for shape in parameter_shapes(config).values())
        return StaticBytes(
            weights=width * params,
            buffers=width * largest,
            host_state=(4 + 4) * own + moments,  # master weights, gradients, moments
            host_buffers=width * own + width * largest,
        )
    return StaticBytes(
        weights=width * params,
        master_weights=4 * own,
        # ZeRO 1 with bf16 is another optimizer in DeepSpeed, which keeps whole fp32 gradients.
        gradients=4 * params if config.parallel.zero_stage == 1 and width == 2 else 0,
        moments=moments,
    )


def _partition(count: int, world_size: int) -> int:
    """Return a rank's part of so many elements, which starts at an even one."""
    return 2 * ceil(count / (2 * world_size))


def _elements_by_kind(config: RunConfig) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name, shape in _moments(config).items():
        kind = name.partition(".")[0]
        counts[kind] = counts.get(kind, 0) + prod(shape)
    return counts


def _zero3_static(config: RunConfig, world_size: int) -> StaticBytes:
    counts = [prod(shape) for shape in parameter_shapes(config).values()]
    own = sum(ceil(count / world_size) for count in counts)
    moments = 4 * sum(ceil(prod(shape) / world_size) for shape in _moments(config).values())
    width = 2 if low_precision(config) else 4
    persistent = width * sum(count for count in counts if count <= _PERSISTENT)
    bucket = config.parallel.bucket_size + config.parallel.bucket_size % 2
    buffers = bucket * (2 if config.parallel.reduce_dtype == "bf16" else 4)
    optimizer = 4 * own + moments  # master weights and moments
    match config.parallel.offload:
        case "none":
            return StaticBytes(width * own + persistent, 4 * own, 4 * own, moments, buffers)
        case "optimizer":  # gradients are there twice: as they are summed, and for the optimizer
            return StaticBytes(weights=width * own + persistent, buffers=buffers, host_state=optimizer + 8 * own)
    return StaticBytes(weights=persistent, buffers=buffers, host_state=optimizer + 8 * own + width * own)


# --- during a step ---------------------------------------------------------------------------------------------------


def _step_gradients(config: RunConfig, world_size: int, params: int) -> int:
    parallel = config.parallel
    if parallel.engine == "ddp":
        return 0 if world_size > 1 else 4 * params
    if parallel.engine == "fsdp":
        return 0 if parallel.offload == "parameters" else 4 * params * parallel.replicate // world_size
    match parallel.zero_stage:
        case 0:
            return 4 * params
        case 1:  # summed once a step, so a rank first has all of its own
            return (2 if low_precision(config) else 4) * params
        case 2:
            return 0 if parallel.offload == "optimizer" else 4 * params // world_size
    return 0


def _weight_copies(config: RunConfig, params: int) -> int:
    """Return the bytes of weights that are gathered from other ranks, or that autocast keeps in bf16."""
    parallel, bf16 = config.parallel, config.trainer.bf16
    width = 2 if bf16 else 4
    block = block_parameters(config.model)
    root = params - config.model.num_hidden_layers * block
    if parallel.engine == "fsdp":
        gathered = root + (2 * block if parallel.reshard_after_forward else params - root)
        return width * gathered
    if parallel.engine == "deepspeed" and parallel.zero_stage == 3:
        return width * min(params, root + block + parallel.bucket_size)
    return 0 if low_precision(config) or not bf16 else 2 * params


def _buckets(config: RunConfig, params: int) -> int:
    """Return the bytes of gradients on their way: what is being summed over ranks, in copies."""
    parallel = config.parallel
    if parallel.engine == "fsdp":  # a block's gradients as computed, and as they are sent
        block = block_parameters(config.model)
        root = params - config.model.num_hidden_layers * block
        wire = 2 if parallel.reduce_dtype == "bf16" else 4
        return max(block, root) * (wire + (2 if config.trainer.bf16 else 4))
    if parallel.engine == "ddp":
        return 0
    fp32_width = 4 * min(params, _ALLREDUCE_ELEMENTS)
    match parallel.zero_stage:
        case 0:
            return fp32_width
        case 1 if low_precision(config) and parallel.offload == "none":
            return fp32_width
        case 1 | 2:  # two buckets, filled in turns
            return 2 * parallel.bucket_size * (2 if low_precision(config) and parallel.zero_stage == 2 else 4)
    return 0


def _activations(config: RunConfig, rows: int) -> int:
    """Estimate what is kept for the backward pass.

    Of each block what its architecture says. A recomputed block keeps its input, the fp32 residual stream, and with
    `selective` also what its matrix products and its attention gave; one block at a time is there in full.
    """
    model, trainer, parallel = config.model, config.trainer, config.parallel
    text, width = rows * config.row_length, 2 if trainer.bf16 else 4
    tokens = ceil(text * states_per_token(config)[0])
    layers, of_block = model.num_hidden_layers, architecture_of(model).activations(model)
    of_all, of_computed = (4 * fp32 + width * others for fp32, others in (of_block.all, of_block.computed))
    block = tokens * (of_all + of_computed)
    if not trainer.gradient_checkpointing:
        computed = ceil(text * config.datacollator.mlm_probability) if trainer.last_layer_of_labels_only else tokens
        return (layers - 1) * block + tokens * of_all + computed * of_computed
    recomputed = ceil(layers / parallel.activation_checkpointing_every)
    kept = tokens * 4 * model.hidden_size
    if parallel.activation_checkpointing == "selective":
        kept += tokens * of_block.products * width
    return (layers - recomputed) * block + recomputed * kept + block


def _loss(config: RunConfig, rows: int) -> int:
    """Return the bytes of the head: its gradients, made in the forward pass, and a block of logits."""
    model, bf16 = config.model, config.trainer.bf16
    width, tokens = 2 if bf16 else 4, rows * config.row_length
    if not config.trainer.masked_logits_only_loss:
        return ceil(tokens * states_per_token(config)[0]) * model.vocab_size * (width + 4 + 4)
    labels = ceil(tokens * config.datacollator.mlm_probability)
    logits = min(labels * model.vocab_size * width, _LOGIT_BLOCK_BYTES)
    matrix = model.vocab_size * model.hidden_size
    return logits + 4 * matrix + (2 * matrix if low_precision(config) else 0) + labels * model.hidden_size * (4 + width)
