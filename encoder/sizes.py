"""Parameters, floating-point operations and bytes of a model, from its config alone (no torch).

Legend: H hidden size, F feed-forward width, L layers, V vocabulary rows, n tokens of a document.
"""

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


def num_parameters(model: ModelConfig) -> int:
    """Return the number of trained parameters, every one counted once."""
    hidden, layers = model.hidden_size, model.num_hidden_layers
    tied = model.tie_word_embeddings and not model.ngpt
    total = block_parameters(model) + model.vocab_size * hidden * (1 if tied else 2)
    total += model.vocab_size if model.decoder_bias else 0
    if model.ngpt:  # step sizes of the two residual branches, scales of q/k and of the feed-forward
        return total + layers * (3 * hidden + 2 * feed_forward_width(model))
    if not model.rope:
        total += (model.max_position_embeddings + 1) * hidden
    return total + (2 * layers + 1) * hidden * (1 if model.rms_norm else 2)


def training_flops(model: ModelConfig, num_tokens: int, sum_squared_lengths: int, num_labels: int) -> int:
    """Return the operations of forward and backward: 6 a matrix parameter and token, attention over real documents.

    `sum_squared_lengths` is the sum of n^2 over documents; the output matrix is counted for labels only.
    """
    matrices = 6 * block_parameters(model) * num_tokens
    attention = 12 * model.num_hidden_layers * model.hidden_size * sum_squared_lengths
    head = 6 * model.hidden_size * model.vocab_size * num_labels
    return matrices + attention + head


def state_bytes(model: ModelConfig) -> dict[str, int]:
    """Return the bytes of fp32 weights, gradients and the two AdamW moments."""
    size = 4 * num_parameters(model)
    return {"weights": size, "gradients": size, "moments": 2 * size}


def checkpoint_bytes(model: ModelConfig) -> int:
    """Return the size of one checkpoint: weights and moments in fp32."""
    return 12 * num_parameters(model)


def activation_bytes(model: ModelConfig, tokens: int, bf16: bool, recompute: bool) -> int:
    """Estimate the bytes kept for the backward pass of one microbatch (about 20 % accurate)."""
    width = 2 if bf16 else 4
    per_block = tokens * (11 * model.hidden_size * width + 4 * feed_forward_width(model) * width)
    if recompute:
        return per_block + model.num_hidden_layers * tokens * model.hidden_size * 4
    return per_block * model.num_hidden_layers
