"""The two-stream benchmark: its rival computes what enc computes. No figures."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from enc.encoder.data.batches import collate
from enc.encoder.data.masking import MaskedRow, Masker
from enc.encoder.data.permutation import permuted_row
from enc.encoder.keyed import numpy_rng
from enc.encoder.models.build import init_weights
from enc.encoder.models.mpnet.config import MpnetConfig
from enc.encoder.models.mpnet.model import MpnetForMaskedLM
from enc.encoder.models.registry import parameters_of
from enc.encoder.objectives.mlm import MlmObjective
from enc.kernels.masked_ce import IGNORE_INDEX
from enc.tools.bench.two_streams import pad, padded_loss, shortest

NUM_TOKENS = 300
SPECIAL = np.arange(NUM_TOKENS) < 5
MASKER = Masker(4, SPECIAL, np.flatnonzero(~SPECIAL), np.zeros(NUM_TOKENS, bool), 0.15)


def document(size: int) -> MaskedRow:
    ids = np.r_[2, np.random.default_rng(size).integers(5, NUM_TOKENS, size - 2), 3]
    return permuted_row(ids, np.array([size]), MASKER, numpy_rng(0, "mask", size), placeholders=True)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_the_rival_has_the_same_loss_and_gradients(pre_norm: bool) -> None:
    """Documents of uneven length, padded, give the sum of losses and the gradients that they give packed."""
    config = MpnetConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                         vocab_size=384, normalize_before=pre_norm, initializer_range=0.1)  # fmt: skip
    model = MpnetForMaskedLM(config, NUM_TOKENS)
    init_weights(model, parameters_of(config), 0)
    model.eval()
    documents = [document(size) for size in (30, 9, 41, 3, 3)]
    results = []
    for loss in (
        lambda: MlmObjective(model, NUM_TOKENS).eval()(collate(documents)).loss_sum,
        lambda: padded_loss(model, config, pad(documents, 1)),
    ):
        model.zero_grad()
        value = loss()
        value.backward()
        results.append((value.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(*(value for value, _ in results))
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], rtol=1e-4, atol=2e-5, msg=name)


def test_the_shortest_document_decides() -> None:
    """annotated-mpnet's rule: each document of a batch predicts as many tokens as the shortest one."""
    batch = pad(shortest([document(size) for size in (30, 9, 41)], MASKER), 1)
    assert batch.targets.shape == (3, 1)
    assert (batch.targets != IGNORE_INDEX).all()


@pytest.mark.slow
def test_the_program_measures() -> None:
    """The program prints every side, with its time, memory and share of predicted tokens."""
    words = ["--rounds", "1", "--documents", "16", "--dtype", "fp32", "--threads", "1", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "enc.tools.bench.two_streams", *words], capture_output=True, text=True, check=True
    )
    sides = json.loads(done.stdout)["results"]["fp32"]["sides"]
    assert sides.keys() == {"enc", "padded", "shortest"}
    assert sides["enc"]["predicted"] == sides["padded"]["predicted"] > sides["shortest"]["predicted"]
    assert all(side["memory_mb"] > 0 < side["step_s"]["median"] for side in sides.values())
