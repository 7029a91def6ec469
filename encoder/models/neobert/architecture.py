"""NeoBERT's facts: its parameters and rules. No torch.

Legend as in ``enc.encoder.models.architecture``.
"""

from collections.abc import Iterator
from typing import NamedTuple

from enc.encoder.models.architecture import Activations, Architecture, Init, Matrix, Parameter, Rule, Shape, rounded_up
from enc.encoder.models.neobert.config import NeoBertConfig


class FeedForward(NamedTuple):
    """One `hidden_act`: the names of its matrices, (F, E) and the one back, and the tensors of F that it keeps."""

    up: tuple[str, ...]
    down: str
    kept: int


FEED_FORWARDS = {
    "swiglu": FeedForward(up=("ffn.w1", "ffn.w2"), down="ffn.w3", kept=4),
    "gelu": FeedForward(up=("ffn.0",), down="ffn.2", kept=2),
}


def feed_forward_width(config: NeoBertConfig) -> int:
    """Return F: 2/3 of `intermediate_size` rounded up to a multiple of 8 for SwiGLU, else `intermediate_size`."""
    if config.ngpt or config.hidden_act != "swiglu":
        return config.intermediate_size
    return rounded_up(int(2 * config.intermediate_size / 3), 8)


def parameters(config: NeoBertConfig) -> dict[str, Parameter]:
    """Return every trained parameter under its name in the model; a tied head has none of its own."""
    hidden, rows = config.hidden_size, config.vocab_size
    table = Init("uniform", config.embedding_init_range)
    found = {"model.encoder.weight": Parameter((rows, hidden), "embedding", table)}
    if not config.rope:
        shape = (config.max_position_embeddings + 1, hidden)
        found["model.positional_embedding.weight"] = Parameter(shape, "embedding", table)
    block = _block(config)
    for layer in range(config.num_hidden_layers):
        found |= {f"model.transformer_encoder.{layer}.{name}": parameter for name, parameter in block.items()}
    if not config.ngpt:
        found |= _norm("model.layer_norm", config)
        if config.tie_word_embeddings:
            return found
    found["decoder.weight"] = Parameter((rows, hidden), "head", Init("uniform", config.decoder_init_range))
    return found | {"decoder.bias": _constant((rows,), "bias", 0.0)} if config.decoder_bias else found


def _block(config: NeoBertConfig) -> dict[str, Parameter]:
    if config.ngpt:
        return _ngpt_block(config)
    hidden, width, kind = config.hidden_size, feed_forward_width(config), FEED_FORWARDS[config.hidden_act]
    attention = {"qkv.weight": _qkv(config), "wo.weight": _matrix(config, (hidden, hidden))}
    up = {f"{name}.weight": _matrix(config, (width, hidden)) for name in kind.up}
    down = {f"{kind.down}.weight": _matrix(config, (hidden, width))}
    return attention | up | down | _norm("attention_norm", config) | _norm("ffn_norm", config)


def _ngpt_block(config: NeoBertConfig) -> dict[str, Parameter]:
    """The scales are stored times `base_scale`, that of the feed-forward starts at 1."""
    hidden, width = config.hidden_size, feed_forward_width(config)
    scale = _constant((hidden,), "scale", config.base_scale)
    halves = tuple(Matrix(part, (2, width, hidden), (index,)) for index, part in enumerate(("up", "gate")))
    return {
        "qkv.weight": _qkv(config),
        "wo.weight": _matrix(config, (hidden, hidden)),
        "c_fc.weight": _matrix(config, (2 * width, hidden), halves),
        "mlp_c_proj.weight": _matrix(config, (hidden, width)),
        "attn_alpha": scale,
        "mlp_alpha": scale,
        "sqk": scale,
        "suv": _constant((2 * width,), "scale", 1.0),
    }


def _qkv(config: NeoBertConfig) -> Parameter:
    """Rows are q, k, v of head 0, then of head 1, ...: three matrices (E, E)."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    view = (heads, 3, hidden // heads, hidden)
    return _matrix(
        config, (3 * hidden, hidden), tuple(Matrix(part, view, (None, index)) for index, part in enumerate("qkv"))
    )


def _matrix(config: NeoBertConfig, shape: Shape, matrices: tuple[Matrix, ...] = ()) -> Parameter:
    init = Init("uniform", config.decoder_init_range)
    return Parameter(shape, "matrix", init, matrices or (Matrix("weight", shape),))


def _constant(shape: Shape, role: str, value: float) -> Parameter:
    return Parameter(shape, role, Init("constant", value))  # type: ignore[arg-type]


def _norm(name: str, config: NeoBertConfig) -> dict[str, Parameter]:
    shape = (config.hidden_size,)
    bias = {} if config.rms_norm else {f"{name}.bias": _constant(shape, "bias", 0.0)}
    return {f"{name}.weight": _constant(shape, "norm", 1.0)} | bias


def block_parameters(config: NeoBertConfig) -> tuple[int, int]:
    """Return the matrix parameters of one block (norms, biases and scales not counted); every one works on a token."""
    count = sum(parameter.size for parameter in _block(config).values() if parameter.role == "matrix")
    return count, count


def activations(config: NeoBertConfig) -> Activations:
    """Return what a block keeps: its input and the residual stream in fp32; what its norms and attention gave; q, k and
    v, q and k after rotation too; tensors of its feed-forward. nGPT also keeps what it normalises, mostly in fp32."""
    hidden, width = config.hidden_size, feed_forward_width(config)
    if config.ngpt:
        normalised = (12 * hidden + 2 * width, 6 * hidden + 3 * width)
        return Activations((hidden, 5 * hidden), normalised, 6 * hidden + 2 * width)
    kind, rotated = FEED_FORWARDS[config.hidden_act], hidden * config.rope
    computed = 3 * hidden + rotated + kind.kept * width
    return Activations((hidden, 3 * hidden + rotated), (hidden, computed), 6 * hidden + len(kind.up) * width)


def rules(config: NeoBertConfig) -> Iterator[Rule]:
    """Yield the broken rules of the section."""
    size, remainder = divmod(config.hidden_size, config.num_attention_heads)
    if config.rope and not remainder and size % 2:
        keys = ("model.num_attention_heads", "model.hidden_size")
        heads = config.num_attention_heads
        yield keys, f"is {heads}, which makes heads of {size}; rotary positions need an even size"
    if config.ngpt and not (config.rope and config.hidden_act == "swiglu"):
        yield ("model.ngpt", "model.rope", "model.hidden_act"), "needs model.rope true and model.hidden_act swiglu"
    if config.decoder_bias and config.tie_word_embeddings and not config.ngpt:
        yield ("model.decoder_bias", "model.tie_word_embeddings"), "needs model.tie_word_embeddings false"


NEOBERT = Architecture(
    name="neobert",
    title="NeoBERT",
    config=NeoBertConfig,
    parameters=parameters,
    block_parameters=block_parameters,
    feed_forward_width=feed_forward_width,
    activations=activations,
    head_parameters=lambda config: config.vocab_size * config.hidden_size,
    attention=lambda config: (False, config.dropout_prob > 0),
    rules=rules,
    objectives=("mlm",),
    model="enc.encoder.models.neobert.model:NeoBertForMaskedLM",
    hub_types=("neobert",),
)
