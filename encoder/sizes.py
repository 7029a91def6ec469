"""Parameters, floating-point operations and bytes of a model, from its config alone (no torch).

Legend: H hidden size, F feed-forward width, L layers, V vocabulary rows, n tokens of a document.
"""

from math import prod

from enc.encoder.config import ModelConfig

VOCAB_MULTIPLE = 128


def padded_vocab_size(num_tokens: int) -> int:
    """Round a tokenizer's size up to a multiple of 128; the added rows are inert."""
    return -(-num_tokens // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def feed_forward_width(model: ModelConfig) -> int:
    """Return F: 2/3 of `intermediate_size` rounded up to a multiple of 8 for SwiGLU, else `intermediate_size`."""
    if model.hidden_act == "gelu" or model.ngpt:
        return model.intermediate_size
    return -(-int(2 * model.intermediate_size / 3) // 8) * 8


def block_parameters(model: ModelConfig) -> int:
    """Return the matrix parameters of all transformer blocks (norms and scales not counted)."""
    matrices = 2 if model.hidden_act == "gelu" else 3
    per_block = 4 * model.hidden_size**2 + matrices * model.hidden_size * feed_forward_width(model)
    return model.num_hidden_layers * per_block


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every trained parameter under its name in the model; a tied head has none of its own."""
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


def _block_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, width = model.hidden_size, feed_forward_width(model)
    up, down = (width, hidden), (hidden, width)
    gelu = {"ffn.0.weight": up, "ffn.2.weight": down}
    swiglu = {"ffn.w1.weight": up, "ffn.w2.weight": up, "ffn.w3.weight": down}
    norms = _norm_shapes("attention_norm", model) | _norm_shapes("ffn_norm", model)
    attention: dict[str, tuple[int, ...]] = {"qkv.weight": (3 * hidden, hidden), "wo.weight": (hidden, hidden)}
    return attention | (gelu if model.hidden_act == "gelu" else swiglu) | norms


def _ngpt_block_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, width = model.hidden_size, feed_forward_width(model)
    return {
        "qkv.weight": (3 * hidden, hidden), "wo.weight": (hidden, hidden),
        "c_fc.weight": (2 * width, hidden), "mlp_c_proj.weight": (hidden, width),
        "attn_alpha": (hidden,), "mlp_alpha": (hidden,), "sqk": (hidden,), "suv": (2 * width,),
    }  # fmt: skip


def _norm_shapes(name: str, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    kinds = ("weight",) if model.rms_norm else ("weight", "bias")
    return {f"{name}.{kind}": (model.hidden_size,) for kind in kinds}


def num_parameters(model: ModelConfig) -> int:
    """Return the number of trained parameters, every one counted once."""
    return sum(prod(shape) for shape in parameter_shapes(model).values())


def training_flops(
    model: ModelConfig, num_tokens: int, sum_squared_lengths: int, num_labels: int, whole_last_layer: bool = False
) -> int:
    """Return the operations of forward and backward: 6 a matrix parameter and token, attention over real documents.

    `sum_squared_lengths` is the sum of n^2 over documents. The output matrix is counted for labels only, and so is what
    the last layer does for a token beyond its key and value, labels spread evenly, unless it is computed whole.
    """
    last = num_tokens if whole_last_layer else num_labels
    block, key_value = block_parameters(model) // model.num_hidden_layers, 2 * model.hidden_size**2
    layers = model.num_hidden_layers - 1
    matrices = 6 * (layers * block * num_tokens + key_value * num_tokens + (block - key_value) * last)
    attention = (
        12 * model.hidden_size * (layers * sum_squared_lengths + sum_squared_lengths * last // max(num_tokens, 1))
    )
    head = 6 * model.hidden_size * model.vocab_size * num_labels
    return matrices + attention + head


def checkpoint_bytes(model: ModelConfig) -> int:
    """Return the size of one checkpoint: weights and moments in fp32."""
    return 12 * num_parameters(model)
