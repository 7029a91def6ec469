"""How many rows of the vocabulary a model has for a tokenizer."""

VOCAB_MULTIPLE = 128


def padded_vocab_size(num_tokens: int) -> int:
    """Round a tokenizer's size up to a multiple of 128; the added rows are inert."""
    return -(-num_tokens // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
