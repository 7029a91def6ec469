"""Sizes that are computed without torch are those of the real model."""

import pytest

from enc.encoder import sizes
from enc.encoder.config import NeoBertConfig
from enc.encoder.config_load import load_config
from enc.encoder.models.neobert import NeoBertForMaskedLM


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_word_embeddings": False},
        {"tie_word_embeddings": False, "decoder_bias": True},
        {"hidden_act": "gelu", "rms_norm": False, "rope": False},
        {"ngpt": True},
        {"intermediate_size": 100},
    ],
)
def test_parameters_are_counted_exactly(options: dict) -> None:
    """Against the names and shapes of a model that was built."""
    small = {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 256,
        "intermediate_size": 96,
    }
    config = NeoBertConfig(**(small | {"max_position_embeddings": 40} | options))
    model = NeoBertForMaskedLM(config, num_tokens=200)
    assert sizes.parameter_shapes(config) == {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert sizes.num_parameters(config) == sum(p.numel() for p in model.parameters())


def test_published_sizes() -> None:
    """NeoBERT's 250 M: 222.8 M tied, 247.4 M untied at 32,000 tokens."""
    model = load_config("neobert-250m").config.model.model_copy(update={"vocab_size": 32000})
    assert round(sizes.num_parameters(model) / 1e6, 1) == 247.4
    tied = model.model_copy(update={"tie_word_embeddings": True})
    assert round(sizes.num_parameters(tied) / 1e6, 1) == 222.8


def test_flops_of_a_step() -> None:
    """6 a matrix parameter and token, 12 L H n^2 for attention, 6 H V a label.

    Of the last layer the other tokens need the keys and values alone.
    """
    model = NeoBertConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, vocab_size=128
    )
    matrices = 2 * (4 * 64 + 3 * 8 * 8)
    head = 6 * 8 * 128 * 3
    assert sizes.training_flops(model, 10, 10, 52, 3, True) == 6 * matrices * 10 + 12 * 2 * 8 * 52 + head
    last = 6 * (2 * 64 * 10 + (2 * 64 + 3 * 8 * 8) * 3) + 12 * 8 * (52 * 3 // 10)
    assert sizes.training_flops(model, 10, 10, 52, 3) == 6 * matrices // 2 * 10 + 12 * 8 * 52 + last + head


@pytest.mark.parametrize(("tokens", "rows"), [(1, 128), (128, 128), (129, 256), (30522, 30592)])
def test_vocabulary_is_padded_to_128(tokens: int, rows: int) -> None:
    assert sizes.padded_vocab_size(tokens) == rows
