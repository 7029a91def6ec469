"""Sizes that are computed without torch are those of the real model."""

import pytest

from enc.encoder.config.load import load_config
from enc.encoder.config.schema import RunConfig
from enc.encoder.models.mpnet.config import MpnetConfig
from enc.encoder.models.mpnet.model import MpnetForMaskedLM
from enc.encoder.models.neobert.config import NeoBertConfig
from enc.encoder.models.neobert.model import NeoBertForMaskedLM
from enc.encoder.models.vocabulary import padded_vocab_size
from enc.encoder.sizing.sizes import num_parameters, parameter_shapes, states_per_token, training_flops


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
    assert parameter_shapes(RunConfig(model=config)) == {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert num_parameters(RunConfig(model=config)) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("options", [{}, {"normalize_before": True, "relative_attention_num_buckets": 12}])
def test_parameters_of_an_mpnet_are_counted_exactly(options: dict) -> None:
    """Against the names and shapes of a model that was built."""
    config = MpnetConfig(hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96,
                         vocab_size=256, max_position_embeddings=40, **options)  # fmt: skip
    model = MpnetForMaskedLM(config, num_tokens=200)
    assert parameter_shapes(RunConfig(model=config)) == {name: tuple(p.shape) for name, p in model.named_parameters()}


def test_mpnet_base() -> None:
    """The defaults are microsoft/mpnet-base: as many parameters as transformers' MPNetForMaskedLM at 30,527 tokens."""
    model = MpnetConfig(vocab_size=30527)
    assert num_parameters(RunConfig(model=model)) == 109_518_527
    assert (model.num_buckets, model.max_distance) == (32, 128)
    longer = MpnetConfig(max_position_embeddings=1024)
    assert (longer.num_buckets, longer.max_distance) == (64, 256)
    assert MpnetConfig(max_position_embeddings=600).num_buckets == 40
    assert MpnetConfig(max_position_embeddings=64).max_distance == 128


def test_published_sizes() -> None:
    """NeoBERT's 250 M: 222.8 M tied, 247.4 M untied at 32,000 tokens."""
    model = load_config("neobert-250m").config.model.model_copy(update={"vocab_size": 32000})
    assert round(num_parameters(RunConfig(model=model)) / 1e6, 1) == 247.4
    tied = model.model_copy(update={"tie_word_embeddings": True})
    assert round(num_parameters(RunConfig(model=tied)) / 1e6, 1) == 222.8


def test_flops_of_a_step() -> None:
    """6 a matrix parameter and token, 12 L H n^2 for attention, 6 H V a label.

    Of the last layer the other tokens need the keys and values alone.
    """
    model = NeoBertConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, vocab_size=128
    )
    matrices = 2 * (4 * 64 + 3 * 8 * 8)
    head = 6 * 8 * 128 * 3
    assert training_flops(model, 10, 10, 52, 3, True) == 6 * matrices * 10 + 12 * 2 * 8 * 52 + head
    last = 6 * (2 * 64 * 10 + (2 * 64 + 3 * 8 * 8) * 3) + 12 * 8 * (52 * 3 // 10)
    assert training_flops(model, 10, 10, 52, 3) == 6 * matrices // 2 * 10 + 12 * 8 * 52 + last + head


def test_flops_of_two_streams() -> None:
    """Queries and placeholders are rows too, placeholders keys; the head has a dense layer before the output matrix."""
    model = MpnetConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, vocab_size=128)
    rows, keys, labels = 14, 12, 2  # 10 tokens of which two are predicted
    first = 6 * ((2 * 64 + 2 * 96) * rows + 2 * 64 * keys) + 12 * 8 * rows * keys
    last = 6 * ((2 * 64 + 2 * 96) * labels + 2 * 64 * keys) + 12 * 8 * labels * keys
    head = 6 * 8 * (128 + 8) * labels
    assert training_flops(model, rows, keys, rows * keys, labels) == first + last + head
    config = RunConfig(model=model).changed({"datacollator.mlm_probability": 0.2})
    assert states_per_token(config) == (rows / 10, keys / 10)
    assert states_per_token(config.changed({"objective": "plm"})) == (1.2, 1.0)
    assert states_per_token(config.changed({"objective": "mlm"})) == (1.0, 1.0)


@pytest.mark.parametrize(("tokens", "rows"), [(1, 128), (128, 128), (129, 256), (30522, 30592)])
def test_vocabulary_is_padded_to_128(tokens: int, rows: int) -> None:
    assert padded_vocab_size(tokens) == rows
