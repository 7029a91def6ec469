"""Parameters, floating-point operations and bytes of a model, from its config alone (no torch).

Legend: H hidden size, F feed-forward width, L layers, V vocabulary rows, P tokens that are predicted.
"""

from math import prod

from enc.encoder.config.schema import RunConfig
from enc.encoder.models.config import ModelConfig
from enc.encoder.models.mpnet.config import MpnetConfig
from enc.encoder.models.neobert.config import NeoBertConfig


def feed_forward_width(model: ModelConfig) -> int:
    """Return F: 2/3 of `intermediate_size` rounded up to a multiple of 8 for SwiGLU, else `intermediate_size`."""
    if not _gated(model) or (isinstance(model, NeoBertConfig) and model.ngpt):
        return model.intermediate_size
    return -(-int(2 * model.intermediate_size / 3) // 8) * 8


def _gated(model: ModelConfig) -> bool:
    return isinstance(model, NeoBertConfig) and model.hidden_act == "swiglu"


def block_parameters(model: ModelConfig) -> int:
    """Return the matrix parameters of all transformer blocks (norms, biases and scales not counted)."""
    matrices = 3 if _gated(model) else 2
    per_block = 4 * model.hidden_size**2 + matrices * model.hidden_size * feed_forward_width(model)
    return model.num_hidden_layers * per_block


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every trained parameter under its name in the model; a tied head has none of its own."""
    if isinstance(model, MpnetConfig):
        return _mpnet_shapes(model)
    assert isinstance(model, NeoBertConfig)
    hidden, rows = model.hidden_size, model.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"model.encoder.weight": (rows, hidden)}
    if not model.rope:
        shapes["model.positional_embedding.weight"] = (model.max_position_embeddings + 1, hidden)
    block = _ngpt_block_shapes(model) if model.ngpt else _block_shapes(model)
    for layer in range(model.num_hidden_layers):
        shapes |= {f"model.transformer_encoder.{layer}.{name}": shape for name, shape in block.items()}
    if not model.ngpt:
        shapes |= _norm_shapes("model.layer_norm", model)
        if model.tie_word_embeddings:
            return shapes
    shapes["decoder.weight"] = (rows, hidden)
    return shapes | {"decoder.bias": (rows,)} if model.decoder_bias else shapes


def _mpnet_shapes(model: MpnetConfig) -> dict[str, tuple[int, ...]]:
    hidden, inner = model.hidden_size, model.intermediate_size
    tables = {
        "word_embeddings": (model.vocab_size, hidden),
        "position_embeddings": (model.max_position_embeddings + 2, hidden),
    }
    matrices = {
        **{f"attention.attn.{name}": (hidden, hidden) for name in "qkvo"},
        "intermediate.dense": (inner, hidden),
        "output.dense": (hidden, inner),
    }
    norms = ["mpnet.embeddings.LayerNorm", "lm_head.layer_norm"]
    norms += ["mpnet.encoder.LayerNorm"] if model.normalize_before else []
    linear = {"lm_head.dense": (hidden, hidden)}
    for layer in (f"mpnet.encoder.layer.{index}" for index in range(model.num_hidden_layers)):
        linear |= {f"{layer}.{name}": shape for name, shape in matrices.items()}
        norms += [f"{layer}.attention.LayerNorm", f"{layer}.output.LayerNorm"]
    shapes: dict[str, tuple[int, ...]] = {f"mpnet.embeddings.{name}.weight": shape for name, shape in tables.items()}
    shapes["mpnet.encoder.relative_attention_bias.weight"] = (model.num_buckets, model.num_attention_heads)
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (hidden,), f"{name}.bias": (hidden,)}
    return {**shapes, "lm_head.bias": (model.vocab_size,)}


def _block_shapes(model: NeoBertConfig) -> dict[str, tuple[int, ...]]:
    hidden, width = model.hidden_size, feed_forward_width(model)
    up, down = (width, hidden), (hidden, width)
    gelu = {"ffn.0.weight": up, "ffn.2.weight": down}
    swiglu = {"ffn.w1.weight": up, "ffn.w2.weight": up, "ffn.w3.weight": down}
    norms = _norm_shapes("attention_norm", model) | _norm_shapes("ffn_norm", model)
    attention: dict[str, tuple[int, ...]] = {"qkv.weight": (3 * hidden, hidden), "wo.weight": (hidden, hidden)}
    return attention | (gelu if model.hidden_act == "gelu" else swiglu) | norms


def _ngpt_block_shapes(model: NeoBertConfig) -> dict[str, tuple[int, ...]]:
    hidden, width = model.hidden_size, feed_forward_width(model)
    return {
        "qkv.weight": (3 * hidden, hidden), "wo.weight": (hidden, hidden),
        "c_fc.weight": (2 * width, hidden), "mlp_c_proj.weight": (hidden, width),
        "attn_alpha": (hidden,), "mlp_alpha": (hidden,), "sqk": (hidden,), "suv": (2 * width,),
    }  # fmt: skip


def _norm_shapes(name: str, model: NeoBertConfig) -> dict[str, tuple[int, ...]]:
    kinds = ("weight",) if model.rms_norm else ("weight", "bias")
    return {f"{name}.{kind}": (model.hidden_size,) for kind in kinds}


def num_parameters(model: ModelConfig) -> int:
    """Return the number of trained parameters, every one counted once."""
    return sum(prod(shape) for shape in parameter_shapes(model).values())


def states_per_token(config: RunConfig) -> tuple[float, float]:
    """Return how many hidden states, and how many keys of attention, a layer has for each token of text.

    A permuted document has a query for each of its P predicted tokens, `mpnet` a placeholder too, which is a key.
    """
    predicted = config.datacollator.mlm_probability
    match config.trained_objective:
        case "mpnet":
            return 1 + 2 * predicted, 1 + predicted
        case "plm":
            return 1 + predicted, 1.0
    return 1.0, 1.0


def training_flops(
    model: ModelConfig, num_states: int, num_keys: int, num_pairs: int, num_labels: int, whole_last_layer: bool = False
) -> int:
    """Return the operations of forward and backward: 6 a matrix parameter and state, attention over real documents.

    Keys and values are made for the keys, all else for every state; `num_pairs` is the sum over documents of states
    times keys. The output matrix is counted for labels only, and so is what the last layer does for a state beyond its
    key and value, labels spread evenly, unless it is computed whole.
    """
    last = num_states if whole_last_layer else num_labels
    block, key_value = block_parameters(model) // model.num_hidden_layers, 2 * model.hidden_size**2
    layers = model.num_hidden_layers - 1
    matrices = 6 * ((block - key_value) * (layers * num_states + last) + key_value * (layers + 1) * num_keys)
    attention = 12 * model.hidden_size * (layers * num_pairs + num_pairs * last // max(num_states, 1))
    head = model.vocab_size + (model.hidden_size if isinstance(model, MpnetConfig) else 0)
    return matrices + attention + 6 * model.hidden_size * head * num_labels


def checkpoint_bytes(model: ModelConfig) -> int:
    """Return the size of one checkpoint: weights and moments in fp32."""
    return 12 * num_parameters(model)
