"""What is known of a model without building it agrees with the model that is built."""

import pytest
import torch
from torch import nn

from enc.encoder.models.build import build_model, init_weights
from enc.encoder.models.mpnet.config import MpnetConfig
from enc.encoder.models.neobert.config import NeoBertConfig
from enc.encoder.models.registry import ARCHITECTURES, architecture_of, parameters_of
from enc.encoder.models.vocabulary import padded_vocab_size

NUM_TOKENS = 300
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 40, "vocab_size": padded_vocab_size(NUM_TOKENS),
}  # fmt: skip
SECTIONS = {
    "neobert": NeoBertConfig(**SIZES),
    "untied": NeoBertConfig(**SIZES, tie_word_embeddings=False, decoder_bias=True),
    "learned": NeoBertConfig(**SIZES, rope=False, rms_norm=False, hidden_act="gelu"),
    "ngpt": NeoBertConfig(**SIZES, ngpt=True),
    "mpnet": MpnetConfig(**SIZES, pad_token_id=3),
    "mpnet-pre": MpnetConfig(**SIZES, normalize_before=True),
}


def built(section) -> nn.Module:  # type: ignore[no-untyped-def]
    model = build_model(section, NUM_TOKENS)
    init_weights(model, parameters_of(section), seed=1)
    return model


@pytest.mark.parametrize("name", SECTIONS)
def test_every_parameter_is_named_with_its_shape(name: str) -> None:
    section = SECTIONS[name]
    found = {name: tuple(parameter.shape) for name, parameter in built(section).named_parameters()}
    assert architecture_of(section).shapes(section) == found


@pytest.mark.parametrize("name", SECTIONS)
def test_matrices_partition_what_blocks_multiply_with(name: str) -> None:
    """Each element of a matrix parameter is in exactly one matrix, and they are all that `block_parameters` counts."""
    section = SECTIONS[name]
    architecture = architecture_of(section)
    parameters, in_blocks = architecture.parameters(section), 0
    for key, parameter in parameters.items():
        assert bool(parameter.matrices) == (parameter.role == "matrix"), key
        numbers = torch.arange(parameter.size).view(parameter.shape)
        parts = [matrix.of(numbers) for matrix in parameter.matrices]
        if parts:
            assert all(part.ndim == 2 for part in parts)
            assert sorted(torch.cat([part.flatten() for part in parts]).tolist()) == list(range(parameter.size)), key
            in_blocks += 0 if key.startswith("lm_head") else parameter.size
    assert in_blocks == section.num_hidden_layers * architecture.block_parameters(section)[1]


def test_the_matrices_of_qkv_are_those_that_make_queries_keys_and_values() -> None:
    """By values: a token times each matrix is what the fused product gives."""
    section = SECTIONS["neobert"]
    model = built(section)
    weight = model.model.transformer_encoder[0].qkv.weight  # type: ignore[union-attr,index]
    matrices = architecture_of(section).parameters(section)["model.transformer_encoder.0.qkv.weight"].matrices
    x = torch.randn(5, section.hidden_size)
    heads = (x @ weight.T).view(5, section.num_attention_heads, 3, -1)  # (T, H, 3, D)
    assert [matrix.part for matrix in matrices] == ["q", "k", "v"]
    for index, matrix in enumerate(matrices):
        torch.testing.assert_close(x @ matrix.of(weight).T, heads[:, :, index].flatten(1))


def test_a_parameter_that_no_rule_names_is_an_error() -> None:
    """Three axes of experts must not start as a constant because nobody thought of them."""
    section = SECTIONS["neobert"]
    model = build_model(section, NUM_TOKENS)
    model.experts = nn.Parameter(torch.empty(4, 16, 32))
    with pytest.raises(ValueError, match=r"experts \(4, 16, 32\) has no rule"):
        init_weights(model, parameters_of(section), seed=0)


@pytest.mark.parametrize("name", SECTIONS)
def test_decay_reaches_matrices_and_heads_and_embeddings_only_if_asked(name: str) -> None:
    for key, parameter in architecture_of(SECTIONS[name]).parameters(SECTIONS[name]).items():
        table = any(word in key for word in ("encoder.weight", "embedding", "relative_attention_bias"))
        table = table and len(parameter.shape) == 2
        assert parameter.decays() == (len(parameter.shape) == 2 and not table), key
        assert parameter.decays(embeddings=True) == (len(parameter.shape) == 2), key


def test_the_first_architecture_is_the_default() -> None:
    assert next(iter(ARCHITECTURES)) == NeoBertConfig().type
