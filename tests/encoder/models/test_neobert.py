"""NeoBERT: equal to the public implementation, on flat tokens, whatever shares a row with a document."""

import itertools
import json
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from places import GOLDEN
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from enc.encoder.config.schema import RunConfig
from enc.encoder.data.batches import Microbatch
from enc.encoder.models.build import init_weights
from enc.encoder.models.neobert.config import NeoBertConfig
from enc.encoder.models.neobert.model import NeoBertForMaskedLM
from enc.encoder.models.registry import parameters_of
from enc.encoder.objectives.mlm import MlmObjective
from enc.encoder.sizing.sizes import num_parameters
from enc.kernels.masked_ce import masked_ce

VARIANTS = ("swiglu", "gelu-layernorm-learned", "ngpt")
LENGTHS = [37, 5, 64, 1, 22]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def tiny_config(**changes) -> NeoBertConfig:
    fields = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, vocab_size=384)
    return NeoBertConfig(**{**fields, "max_position_embeddings": 128, **changes})


def tiny_model(seed: int = 0, num_tokens: int = 300, **changes) -> NeoBertForMaskedLM:
    # Wide initial ranges: with the usual 0.02 the blocks hardly change the residual stream, and tests see little.
    config = tiny_config(**{"decoder_init_range": 0.2, "embedding_init_range": 0.5, **changes})
    model = NeoBertForMaskedLM(config, num_tokens)
    init_weights(model, parameters_of(config), seed)
    return model


def flat_batch(lengths: list[int] = LENGTHS, seed: int = 0, num_tokens: int = 300) -> tuple[torch.Tensor, ...]:
    """Return ids (T,), cu_seqlens (N + 1,), positions (T,) and labels (T,) with about one in four labelled."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, num_tokens, (sum(lengths),), generator=generator)
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.25, ids, -100)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return ids, cu_seqlens, torch.cat([torch.arange(n) for n in lengths]), labels


def masked_loss(model: NeoBertForMaskedLM, ids, cu_seqlens, positions, labels) -> torch.Tensor:
    hidden = model(ids, cu_seqlens, positions)
    rows = (labels != -100).nonzero()[:, 0]
    return masked_ce(hidden[rows], model.head_weight, None, labels[rows], model.num_tokens)[0]


def gradients(model: NeoBertForMaskedLM, *batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    masked_loss(model, *batch).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_close(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Compare each tensor, relative to the largest entry of the expected one."""
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        error = (ours[name] - value).abs().max() / value.abs().max().clamp_min(1e-12)
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def golden_model(variant: str) -> tuple[NeoBertForMaskedLM, dict[str, torch.Tensor]]:
    folder = GOLDEN / f"neobert-{variant}"
    fields = json.loads((folder / "config.json").read_text())
    fields["max_position_embeddings"] = fields["max_length"]
    known = {key: value for key, value in fields.items() if key in NeoBertConfig.model_fields}
    known.pop("attn_backend")
    model = NeoBertForMaskedLM(NeoBertConfig(**known, tie_word_embeddings=False), fields["vocab_size"])
    model.load_state_dict(load_file(folder / "weights.safetensors"))
    return model, load_file(folder / "batch.safetensors")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_packed_run_meets_the_public_implementation(variant):
    """Logits, loss and every gradient of five documents in one row equal the public code's, one at a time."""
    model, golden = golden_model(variant)
    _, cu_seqlens, positions, _ = flat_batch(golden["lengths"].tolist())
    batch = golden["ids"], cu_seqlens, positions, golden["labels"]
    logits = model.logits(model(*batch[:3]))
    torch.testing.assert_close(logits, golden["logits"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(masked_loss(model, *batch), golden["loss_sum"][0], atol=0, rtol=1e-6)
    expected = {name.removeprefix("grad."): t for name, t in golden.items() if name.startswith("grad.")}
    assert_close(gradients(model, *batch), expected, 1e-4)


@pytest.mark.parametrize("changes", [{}, {"hidden_act": "gelu", "rms_norm": False, "rope": False}, {"ngpt": True}])
def test_packing_changes_nothing(changes):
    """Hidden states and summed gradients of a packed row equal those of its documents run one by one."""
    model = tiny_model(**changes)
    ids, cu_seqlens, positions, labels = flat_batch()
    packed, packed_grads = model(ids, cu_seqlens, positions), gradients(model, ids, cu_seqlens, positions, labels)
    outputs, sums = [], {}
    for start, stop in itertools.pairwise(cu_seqlens):
        alone = ids[start:stop], torch.tensor([0, stop - start], dtype=torch.int32), positions[start:stop]
        outputs.append(model(*alone))
        for name, grad in gradients(model, *alone, labels[start:stop]).items():
            sums[name] = sums.get(name, 0) + grad
    torch.testing.assert_close(packed, torch.cat(outputs), atol=1e-5, rtol=1e-5)
    assert_close(packed_grads, sums, 1e-5)


@pytest.mark.parametrize("changes", [{}, {"hidden_act": "gelu", "rms_norm": False, "rope": False}, {"ngpt": True}])
def test_a_document_is_blind_to_the_others(changes):
    """Replacing one document leaves the bits of all others."""
    model = tiny_model(**changes)
    ids, cu_seqlens, positions, _ = flat_batch()
    before = model(ids, cu_seqlens, positions)
    ids[42:106] = ids[42:106].flip(0)
    after = model(ids, cu_seqlens, positions)
    assert torch.equal(before[:42], after[:42])
    assert torch.equal(before[106:], after[106:])
    assert not torch.allclose(before[42:106], after[42:106])


@pytest.mark.parametrize("changes", [{}, {"hidden_act": "gelu", "rms_norm": False, "rope": False}, {"ngpt": True}])
@pytest.mark.parametrize("rows", [[0, 3, 40, 41, 42, 106, 128, 128, 128], [128], [41], []])
def test_the_last_layer_of_some_rows(changes, rows):
    """States of chosen rows, one of them thrice, and all gradients, are those of a whole last layer."""
    model = tiny_model(**changes).double()
    ids, cu_seqlens, positions, _ = flat_batch()
    rows = torch.tensor(rows, dtype=torch.int64)
    weights = torch.randn(len(rows), 48, dtype=torch.float64)
    results = []
    for hidden in (model(ids, cu_seqlens, positions)[rows], model(ids, cu_seqlens, positions, rows)):
        model.zero_grad()
        (hidden * weights).sum().backward()
        results.append((hidden, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
    (expected, expected_grads), (hidden, grads) = results
    torch.testing.assert_close(hidden, expected, atol=1e-12, rtol=1e-12)
    assert_close(grads, expected_grads, 1e-7)  # rotations are fp32 always


def test_the_last_layer_of_some_rows_is_less_work():
    """Matrix products shrink by (1 - share of rows) of all but the key and value projection of one of three layers."""
    model = tiny_model()
    ids, cu_seqlens, positions, labels = flat_batch()
    rows = (labels != -100).nonzero()[:, 0]
    counts = []
    for chosen in (None, rows):
        with FlopCounterMode(display=False) as counter:
            model(ids, cu_seqlens, positions, chosen)
        counts.append(sum(counter.get_flop_counts()["Global"].values()))
    block = 2 * (4 * 48 * 48 + 3 * 48 * 64)
    assert counts[0] == 3 * block * len(ids)
    assert counts[0] - counts[1] == (block - 2 * 2 * 48 * 48) * (len(ids) - len(rows))


def brute_force_loss(model: NeoBertForMaskedLM, weights: dict[str, torch.Tensor], ids, cu_seqlens, positions, labels):
    """NeoBERT from its equations: one dense block mask, full logits, every sum in the dtype of the weights."""
    head_dim, num_heads = model.model.head_dim, 4
    document = torch.bucketize(torch.arange(len(ids)), cu_seqlens[1:-1], right=True)
    apart = document[:, None] != document[None, :]
    angles = positions[:, None] * 10000.0 ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights[name]

    def rotate(x):
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turns).flatten(-2)

    x = weights["model.encoder.weight"][ids]
    for layer in range(3):
        block = f"model.transformer_encoder.{layer}."
        heads = (norm(x, block + "attention_norm.weight") @ weights[block + "qkv.weight"].T).view(
            -1, num_heads, 3 * head_dim
        )
        q, k, v = heads.split(head_dim, dim=-1)
        scores = torch.einsum("ihd,jhd->hij", rotate(q), rotate(k)) / head_dim**0.5
        mixed = torch.einsum("hij,jhd->ihd", scores.masked_fill(apart, -torch.inf).softmax(-1), v).flatten(1)
        x = x + mixed @ weights[block + "wo.weight"].T
        h = norm(x, block + "ffn_norm.weight")
        gate, up = (h @ weights[block + f"ffn.w{i}.weight"].T for i in (1, 2))
        x = x + (gate * gate.sigmoid() * up) @ weights[block + "ffn.w3.weight"].T
    logits = norm(x, "model.layer_norm.weight") @ weights["model.encoder.weight"][: model.num_tokens].T
    return F.cross_entropy(logits, labels, reduction="sum")


def test_loss_and_gradients_equal_the_equations_in_fp64():
    """The whole stack, tied head and inert rows included, against a dense fp64 computation."""
    model = tiny_model()
    batch = flat_batch()
    weights = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    expected = brute_force_loss(model, weights, *batch)
    grads = dict(zip(weights, torch.autograd.grad(expected, list(weights.values())), strict=True))
    torch.testing.assert_close(masked_loss(model, *batch).double(), expected, atol=0, rtol=1e-6)
    assert_close(gradients(model, *batch), grads, 1e-5)


def test_bf16_autocast_is_as_close_to_fp64_as_plain_pytorch():
    """Under autocast the residual stream and the loss are fp32, and the loss is right to bf16's precision."""
    model = tiny_model()
    batch = flat_batch()
    exact = masked_loss(model, *batch)
    with torch.autocast("cpu", torch.bfloat16):
        hidden, loss = model(*batch[:3]), masked_loss(model, *batch)
    assert hidden.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, atol=0, rtol=5e-3)


@pytest.mark.parametrize("full_logits", [False, True])
def test_the_bias_of_the_head_is_in_the_loss(full_logits):
    """Both loss paths, and the bias' gradient, equal plain cross-entropy of the logits with it."""
    model = tiny_model(tie_word_embeddings=False, decoder_bias=True)
    torch.nn.init.normal_(model.decoder.bias)
    ids, cu_seqlens, positions, labels = flat_batch()
    places = (labels != -100).nonzero()[:, 0]
    counts = max(LENGTHS), len(ids), len(places)
    batch = Microbatch(ids, cu_seqlens, positions, places, labels[places], *counts)
    loss = MlmObjective(model, model.num_tokens, full_logits=full_logits)(batch).loss_sum
    logits = F.linear(model(ids, cu_seqlens, positions), model.decoder.weight, model.decoder.bias)[
        :, : model.num_tokens
    ]
    expected = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    torch.testing.assert_close(loss, expected)
    found, wanted = (torch.autograd.grad(value, model.decoder.bias)[0] for value in (loss, expected))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert found[: model.num_tokens].any()


def test_z_loss_and_smoothing_are_in_both_loss_paths():
    """Labelled logits alone and the logits of all tokens give the same loss, which is not the plain one."""
    model = tiny_model()
    ids, cu_seqlens, positions, labels = flat_batch()
    places = (labels != -100).nonzero()[:, 0]
    counts = max(LENGTHS), len(ids), len(places)
    batch = Microbatch(ids, cu_seqlens, positions, places, labels[places], *counts)
    terms = {"z_loss": 1e-2, "label_smoothing": 0.1}
    masked, full = (MlmObjective(model, model.num_tokens, full_logits=full, **terms)(batch) for full in (False, True))
    torch.testing.assert_close(masked, full)
    plain = MlmObjective(model, model.num_tokens)(batch).loss_sum
    assert abs(masked.loss_sum - plain) > 1
    evaluated = MlmObjective(model, model.num_tokens, **terms).eval()(batch).loss_sum
    torch.testing.assert_close(evaluated, plain)


def test_inert_rows_get_no_gradient():
    """Embedding rows past the tokenizer's last token stay where they are."""
    model = tiny_model()
    grads = gradients(model, *flat_batch())
    assert model.head_weight.shape == (384, 48)
    assert grads["model.encoder.weight"][300:].abs().max() == 0


def test_gradient_checkpointing_changes_no_gradient():
    """With dropout on, the second forward of each block draws the same masks."""
    model = tiny_model(dropout_prob=0.3).train()
    expected = None
    for what, every in ((None, 1), ("full", 1), ("full", 2), ("selective", 1)):
        model.recompute(what, every)
        torch.manual_seed(1)
        grads = gradients(model, *flat_batch())
        expected = expected or grads
    assert_close(grads, expected, 1e-6)


def test_dropout_follows_the_seed_and_is_off_in_eval():
    """The same seed gives the same bits, another seed others, and eval mode none."""
    model = tiny_model(dropout_prob=0.3).train()
    batch = flat_batch()[:3]
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(model(*batch))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2])
    assert torch.equal(model.eval()(*batch), model(*batch))


@pytest.mark.parametrize("tied", [True, False])
def test_state_dict_holds_each_tensor_once_under_neoberts_names(tied):
    """A tied head is no second entry; the parameter count is the planner's."""
    model = tiny_model(tie_word_embeddings=tied)
    names = list(model.state_dict())
    assert ("decoder.weight" in names) is not tied
    assert names == [name for name, _ in model.named_parameters()]
    assert sum(p.numel() for p in model.parameters()) == num_parameters(
        RunConfig(model=tiny_config(tie_word_embeddings=tied))
    )


def test_init_depends_on_names_and_seed_alone():
    """A deeper model starts with the same first layers; ranges are the config's."""
    shallow, deep, other = tiny_model(), tiny_model(num_hidden_layers=5), tiny_model(seed=1)
    for name, value in shallow.state_dict().items():
        assert torch.equal(value, deep.state_dict()[name])
        assert value.dim() == 1 or not torch.equal(value, other.state_dict()[name])
    assert 0.45 < shallow.model.encoder.weight.abs().max() <= 0.5
    assert 0.19 < shallow.model.transformer_encoder[0].qkv.weight.abs().max() <= 0.2


@pytest.mark.filterwarnings("ignore")  # dynamo's own deprecations
def test_compiled_equals_eager():
    """Attention is opaque to torch.compile, and loss and gradients are those of eager mode."""
    model = tiny_model()
    expected, batch = gradients(model, *flat_batch()), flat_batch()
    model.compile(backend="aot_eager", fullgraph=True)
    assert_close(gradients(model, *batch), expected, 1e-5)


class _Counts(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("what", "every", "products", "activations"), [
    (None, 1, 0, 0), ("full", 1, 1, 1), ("full", 2, 0.5, 0.5), ("selective", 1, 0, 1), ("selective", 2, 0, 0.5),
])  # fmt: skip
def test_recomputation_does_again_what_it_says(what, every, products, activations):
    """The share of a block's matrix products, attentions and activations that run a second time."""
    counted = {}
    for setting in ((None, 1), (what, every)):
        model = tiny_model(num_hidden_layers=4).train()
        model.recompute(*setting)
        ids, cu_seqlens, positions, *_ = flat_batch()
        with _Counts() as mode:
            model(ids, cu_seqlens, positions).sum().backward()
        counted[setting] = mode.counts
    plain, found = counted[None, 1], counted[what, every]
    # Each of a block's five products takes two in the backward pass; the last one is not needed a second time.
    assert found["mm"] - plain["mm"] == products * plain["mm"] / 3 * 4 / 5
    assert found["silu"] - plain["silu"] == activations * plain["silu"]
    assert found["varlen_attention"] - plain["varlen_attention"] == products * plain["varlen_attention"]
