"""MPNet's facts: its parameters and rules. No torch.

Legend as in ``enc.encoder.models.architecture``.
"""

from collections.abc import Iterator

from enc.encoder.models.architecture import Activations, Architecture, Init, Matrix, Parameter, Rule, Shape
from enc.encoder.models.mpnet.config import MpnetConfig

POSITION_OFFSET = 2  # rows 0 and 1 of the position table are never read: fairseq gave 1 to padding


def parameters(config: MpnetConfig) -> dict[str, Parameter]:
    """Return every trained parameter under its name in the model, which is transformers'."""
    hidden = config.hidden_size
    tables = {
        "word_embeddings": ((config.vocab_size, hidden), config.pad_token_id),
        "position_embeddings": ((config.max_position_embeddings + POSITION_OFFSET, hidden), POSITION_OFFSET - 1),
    }
    norms = ["mpnet.embeddings.LayerNorm", "lm_head.layer_norm"]
    norms += ["mpnet.encoder.LayerNorm"] if config.normalize_before else []
    linear: dict[str, Shape] = {"lm_head.dense": (hidden, hidden)}
    for layer in (f"mpnet.encoder.layer.{index}" for index in range(config.num_hidden_layers)):
        linear |= {f"{layer}.{name}": shape for name, shape in _block_matrices(config).items()}
        norms += [f"{layer}.attention.LayerNorm", f"{layer}.output.LayerNorm"]
    found = {
        f"mpnet.embeddings.{name}.weight": _table(config, shape, zero_row) for name, (shape, zero_row) in tables.items()
    }
    buckets = (config.num_buckets, config.num_attention_heads)
    found["mpnet.encoder.relative_attention_bias.weight"] = _table(config, buckets)
    for name, shape in linear.items():
        weight = Parameter(shape, "matrix", _normal(config), (Matrix("weight", shape),))
        found |= {f"{name}.weight": weight, f"{name}.bias": _bias(shape[0])}
    for name in norms:
        norm = Parameter((hidden,), "norm", Init("constant", 1.0))
        found |= {f"{name}.weight": norm, f"{name}.bias": _bias(hidden)}
    return {**found, "lm_head.bias": _bias(config.vocab_size)}


def _block_matrices(config: MpnetConfig) -> dict[str, Shape]:
    hidden, inner = config.hidden_size, config.intermediate_size
    attention = {f"attention.attn.{name}": (hidden, hidden) for name in "qkvo"}
    return {**attention, "intermediate.dense": (inner, hidden), "output.dense": (hidden, inner)}


def _normal(config: MpnetConfig, zero_row: int | None = None) -> Init:
    return Init("normal", config.initializer_range, zero_row)


def _table(config: MpnetConfig, shape: Shape, zero_row: int | None = None) -> Parameter:
    return Parameter(shape, "embedding", _normal(config, zero_row))


def _bias(size: int) -> Parameter:
    return Parameter((size,), "bias", Init("constant", 0.0))


def block_parameters(config: MpnetConfig) -> tuple[int, int]:
    """Return the matrix parameters of one block (norms and biases not counted); every one works on a token."""
    count = sum(rows * columns for rows, columns in _block_matrices(config).values())
    return count, count


def activations(config: MpnetConfig) -> Activations:
    """Return what a block keeps: its input and the residual stream in fp32; what its norms and attention gave; q, k and
    v; the feed-forward before and after its activation."""
    hidden, width = config.hidden_size, config.intermediate_size
    return Activations((hidden, 3 * hidden), (hidden, 3 * hidden + 2 * width), 6 * hidden + width)


def rules(config: MpnetConfig) -> Iterator[Rule]:
    """Yield the broken rules of the section."""
    if config.max_distance <= config.num_buckets // 4:
        yield (
            ("model.relative_attention_max_distance", "model.relative_attention_num_buckets"),
            f"is {config.max_distance}, but a quarter of the {config.num_buckets} buckets are of one distance each; it "
            f"must be more than {config.num_buckets // 4}",
        )


MPNET = Architecture(
    name="mpnet",
    title="MPNet",
    config=MpnetConfig,
    parameters=parameters,
    block_parameters=block_parameters,
    feed_forward_width=lambda config: config.intermediate_size,
    activations=activations,
    head_parameters=lambda config: (config.vocab_size + config.hidden_size) * config.hidden_size,
    attention=lambda config: (True, config.attention_dropout_prob > 0),
    rules=rules,
    objectives=("mpnet", "plm", "mlm"),
    model="enc.encoder.models.mpnet.model:MpnetForMaskedLM",
    init_from=lambda config: config.init_from,
    pretrained="enc.encoder.models.mpnet.pretrained",
    pad_id=1,  # transformers' MPNet knows no other
    hub_types=("mpnet", "enc_mpnet"),
)
