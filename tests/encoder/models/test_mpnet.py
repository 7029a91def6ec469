"""MPNet: what annotated-mpnet computed, a loop written from the paper's masks, and what must not matter."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from places import GOLDEN
from safetensors.torch import load_file
from tiny_mpnet import disturb
from torch import Tensor

from enc.encoder.config.schema import RunConfig
from enc.encoder.data.batches import Microbatch, collate, mask_row
from enc.encoder.data.masking import MaskedRow, Masker
from enc.encoder.data.permutation import permuted_row
from enc.encoder.data.store import TokenStore
from enc.encoder.data.store_data import packed_rows
from enc.encoder.data.tokenizer import EncoderTokenizer
from enc.encoder.keyed import numpy_rng
from enc.encoder.models.build import init_weights
from enc.encoder.models.mpnet.config import MpnetConfig
from enc.encoder.models.mpnet.model import ACTIVATIONS, MpnetForMaskedLM
from enc.encoder.models.registry import parameters_of
from enc.encoder.objectives.mlm import MlmObjective
from enc.kernels.attention_rules import relative_buckets
from enc.tools.models.mpnet.names import own_tensors

MASK, NUM_TOKENS = 4, 300
SPECIAL = np.arange(NUM_TOKENS) < 5
TINY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 384}
QUIET = {"dropout_prob": 0.0, "attention_dropout_prob": 0.0, "activation_dropout_prob": 0.0}


def tiny_config(**changes) -> MpnetConfig:
    return MpnetConfig(**{**TINY, **QUIET, "max_position_embeddings": 128, "initializer_range": 0.1, **changes})


def tiny_model(seed: int = 0, **changes) -> MpnetForMaskedLM:
    """Return a small model whose norms and biases are not at their first values."""
    config = tiny_config(**changes)
    model = MpnetForMaskedLM(config, NUM_TOKENS)
    init_weights(model, parameters_of(config), seed)
    disturb(model, seed, 0.1)
    return model


def masker(**options) -> Masker:
    continues = np.zeros(NUM_TOKENS, bool)
    continues[200:] = True
    return Masker(MASK, SPECIAL, np.flatnonzero(~SPECIAL), continues, **{"probability": 0.2, **options})


def row_of(lengths: list[int], seed: int = 0, objective: str = "mpnet", **options) -> MaskedRow:
    """Return a permuted row of documents of random tokens, each between two special ones."""
    rng = np.random.default_rng(seed)
    ids = np.concatenate([np.r_[2, rng.integers(5, NUM_TOKENS, n - 2), 3] for n in lengths])
    chosen = masker(**options)
    return permuted_row(ids, np.array(lengths), chosen, numpy_rng(seed, "mask"), objective == "mpnet")


def batch_of(*lengths: int, **options) -> Microbatch:
    return collate([row_of(list(lengths), **options)])


def run(model: MpnetForMaskedLM, batch: Microbatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the loss, the logits of the labelled rows and the gradients."""
    model.zero_grad()
    loss = MlmObjective(model, NUM_TOKENS)(batch).loss_sum
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), query_logits(model, batch), grads


def query_logits(model: MpnetForMaskedLM, batch: Microbatch) -> Tensor:
    """Return the logits of the labelled rows, (labels, V)."""
    assert batch.streams is not None
    with torch.no_grad():
        hidden = model(
            batch.input_ids, batch.cu_seqlens, batch.position_ids, batch.label_positions[: batch.num_labels],
            batch.max_seqlen, **batch.streams._asdict(),
        )  # fmt: skip
        return model.logits(hidden)[:, : model.num_tokens]


# --- what annotated-mpnet computed -----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["mpnet-post", "mpnet-pre"])
def test_golden(variant: str) -> None:
    """Loss, logits and gradients of a batch equal those that annotated-mpnet computed, its padding left out."""
    fields = json.loads((GOLDEN / variant / "config.json").read_text())
    pad, predicted = fields["pad_token_id"], fields["pred_size"]
    config = MpnetConfig(
        hidden_size=fields["encoder_embed_dim"], num_hidden_layers=fields["encoder_layers"],
        num_attention_heads=fields["encoder_attention_heads"], intermediate_size=fields["encoder_ffn_dim"],
        hidden_act=fields["activation_fn"], normalize_before=fields["normalize_before"],
        max_position_embeddings=fields["max_positions"],
        relative_attention_num_buckets=fields["relative_attention_num_buckets"],
        relative_attention_max_distance=fields["relative_attention_max_distance"], **QUIET,
    )  # fmt: skip
    num_tokens = fields["vocab_rows"]
    model = MpnetForMaskedLM(config, num_tokens)
    golden = load_file(GOLDEN / variant / "batch.safetensors")
    model.load_state_dict(in_own_names(load_file(GOLDEN / variant / "weights.safetensors"), pad))
    batch = collate([golden_row(golden, b, predicted, pad) for b in range(len(golden["targets"]))])
    loss = MlmObjective(model, num_tokens)(batch).loss_sum
    loss.backward()
    assert loss.item() == pytest.approx(golden["loss_sum"].item(), rel=1e-5)
    order = torch.cat([positions.argsort() for positions in golden["positions"][:, -predicted:]])
    order += torch.arange(len(golden["targets"])).repeat_interleave(predicted) * predicted
    expected = golden["logits"].flatten(0, 1)[order]
    torch.testing.assert_close(query_logits(model, batch), expected, rtol=0, atol=1e-5)
    wanted = in_own_names({name[5:]: t for name, t in golden.items() if name.startswith("grad.")}, pad)
    found = {name: p.grad for name, p in model.named_parameters()}
    assert wanted.keys() == found.keys()
    for name, gradient in found.items():
        assert (gradient - wanted[name]).norm() <= 1e-4 * wanted[name].norm() + 1e-6, name


def in_own_names(tensors: dict[str, Tensor], pad_id: int) -> dict[str, Tensor]:
    """Return tensors of annotated-mpnet in our names, the vocabulary padded as it is here."""
    renamed = {own: t for name, tensor in tensors.items() for own, t in own_tensors(name, tensor, pad_id).items()}
    for name in ("mpnet.embeddings.word_embeddings.weight", "lm_head.bias"):
        rows = -len(renamed[name]) % 128
        renamed[name] = torch.cat([renamed[name], torch.zeros(rows, *renamed[name].shape[1:])])
    return renamed


def golden_row(golden: dict[str, Tensor], b: int, predicted: int, pad: int) -> MaskedRow:
    """Return one of annotated-mpnet's sequences, ids [others | predicted | masks | masks], as a row of ours."""
    ids, positions = golden["input_ids"][b].numpy(), golden["positions"][b].numpy()
    size = len(ids) - 2 * predicted
    text = np.empty(size, np.int64)
    text[positions[:size]] = ids[:size]
    text = text[text != pad]
    order, shown = positions[size : size + predicted], ids[-predicted:]

    class Given(Masker):
        def permute(self, ids, rng, least=0):
            return order

        def shown(self, labels, rng):
            return shown[order.argsort()]

    given = Given(MASK, SPECIAL, np.arange(5), SPECIAL, 0.15)
    row = permuted_row(text, np.array([len(text)]), given, np.random.default_rng(0), placeholders=True)
    assert np.array_equal(row.labels, golden["targets"][b].numpy()[order.argsort()])
    return row


# --- a loop from the paper's masks -----------------------------------------------------------------------------------


def brute_force(model: MpnetForMaskedLM, config: MpnetConfig, row: MaskedRow, objective: str) -> tuple[Tensor, Tensor]:
    """Return (loss, logits of the queries in the order of the text) of a row, one document and one row at a time."""
    logits = []
    assert row.streams is not None
    start = 0
    for size in row.streams.lengths:
        part = slice(start, start + size)
        start += size
        logits.append(_document(model, config, row.ids[part], row.positions[part], row.streams.stages[part], objective))
    joined = torch.cat(logits)
    return F.cross_entropy(joined, torch.from_numpy(row.labels), reduction="sum"), joined


def _document(model, config, ids, positions, stages, objective) -> Tensor:
    """Two streams over [others | real targets | placeholders] with the queries apart, masks cell by cell."""
    copies = 2 if objective == "mpnet" else 1
    text_size = next(n for n in range(len(ids) + 1) if n + copies * int((stages[:n] > 0).sum()) == len(ids))
    when = stages[:text_size]
    order = [int(np.flatnonzero(when == j + 1)[0]) for j in range(int((when > 0).sum()))]  # positions as predicted
    predicted, others = len(order), [p for p in range(text_size) if when[p] == 0]
    shown = {int(p): int(i) for p, i in zip(positions[text_size:], ids[text_size:], strict=True)}
    content = [(int(ids[p]), p) for p in others + order]
    content += [(shown[p], p) for p in order] if objective == "mpnet" else []
    queries = [(shown[p], p) for p in order]
    first_real, first_held = len(others), len(others) + predicted

    def visible(kind: str, i: int, key: int) -> bool:
        if key < first_real:
            return True
        if key < first_held:
            j = key - first_real
            return {"query": j < i, "real": j <= i}.get(kind, False)
        j = key - first_held
        return {"query": j >= i, "real": j > i}.get(kind, True)

    kinds = [("other", 0)] * first_real + [("real", i) for i in range(predicted)]
    kinds += [("held", i) for i in range(len(content) - first_held)]
    seen_by_content = torch.tensor([[visible(*kind, key) for key in range(len(content))] for kind in kinds])
    seen_by_queries = torch.tensor(
        [[visible("query", i, key) for key in range(len(content))] for i in range(predicted)]
    )
    if objective == "mpnet":  # every row sees as many positions as there are
        assert (seen_by_content.sum(1) == text_size).all()
        assert (seen_by_queries.sum(1) == text_size).all()
    weights = dict(model.named_parameters())
    norm = partial(_norm, weights, config)
    activation = ACTIVATIONS[config.hidden_act]
    word, place = (weights[f"mpnet.embeddings.{kind}_embeddings.weight"] for kind in ("word", "position"))
    c, q = (
        norm("mpnet.embeddings.LayerNorm", torch.stack([word[i] + place[p + 2] for i, p in rows]))
        for rows in (content, queries)
    )
    key_places = torch.tensor([p for _, p in content])
    table = weights["mpnet.encoder.relative_attention_bias.weight"]
    for layer in range(config.num_hidden_layers):
        name = f"mpnet.encoder.layer.{layer}"
        pre = config.normalize_before
        keys = norm(f"{name}.attention.LayerNorm", c) if pre else c
        updated = []
        for x, rows, seen in ((c, content, seen_by_content), (q, queries, seen_by_queries)):
            normed = norm(f"{name}.attention.LayerNorm", x) if pre else x
            distances = key_places[None] - torch.tensor([p for _, p in rows])[:, None]
            bias = table[relative_buckets(distances, config.num_buckets, config.max_distance)]
            attended = _attention(weights, config, f"{name}.attention.attn", normed, keys, bias, seen)
            x = x + attended if pre else norm(f"{name}.attention.LayerNorm", x + attended)
            inner = norm(f"{name}.output.LayerNorm", x) if pre else x
            inner = _linear(weights, f"{name}.output.dense",
                            activation(_linear(weights, f"{name}.intermediate.dense", inner)))  # fmt: skip
            updated.append(x + inner if pre else norm(f"{name}.output.LayerNorm", x + inner))
        c, q = updated
    if config.normalize_before:
        q = norm("mpnet.encoder.LayerNorm", q)
    q = norm("lm_head.layer_norm", activation(_linear(weights, "lm_head.dense", q)))
    logits = q @ word[: model.num_tokens].T + weights["lm_head.bias"][: model.num_tokens]
    return logits[np.argsort(order)]


def _attention(weights, config, name, x, keys, bias, seen) -> Tensor:
    size = config.hidden_size // config.num_attention_heads
    out = []
    for head in range(config.num_attention_heads):
        part = slice(head * size, (head + 1) * size)
        q, k, v = (_linear(weights, f"{name}.{kind}", y)[:, part] for kind, y in (("q", x), ("k", keys), ("v", keys)))
        scores = q @ k.T / size**0.5 + bias[..., head]
        out.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v)
    return _linear(weights, f"{name}.o", torch.cat(out, 1))


def _linear(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def _norm(weights: dict[str, Tensor], config: MpnetConfig, name: str, x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    x = (x - mean) / (x.var(-1, keepdim=True, unbiased=False) + config.norm_eps).sqrt()
    return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]


@pytest.mark.parametrize("objective", ["mpnet", "plm"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"normalize_before": True, "hidden_act": "silu"},
        {"relative_attention_num_buckets": 14, "hidden_act": "tanh"},
    ],
    ids=["post", "pre", "buckets"],
)
@pytest.mark.parametrize("lengths", [(3,), (7, 40, 5, 61), (12, 12, 60)], ids=str)
def test_brute_force(objective: str, changes: dict, lengths: tuple[int, ...]) -> None:
    """Loss, logits and every gradient of packed documents equal those of a loop over cells of the paper's masks."""
    model, config = tiny_model(**changes), tiny_config(**changes)
    row = row_of(list(lengths), seed=len(lengths), objective=objective)
    loss, logits, grads = run(model, collate([row]))
    model.zero_grad()
    expected_loss, expected = brute_force(model, config, row, objective)
    expected_loss.backward()
    torch.testing.assert_close(loss, expected_loss.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, expected.detach(), rtol=0, atol=1e-5)
    for name, parameter in model.named_parameters():
        wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        # The key bias drops out of a softmax: its gradient is rounding alone.
        scale = wanted.abs().max().clamp(min=1e-2 if ".k.bias" in name else 1e-4)
        assert (grads.get(name, torch.zeros(())) - wanted).abs().max() <= 1e-5 * max(scale.item(), 1), name


def test_predicted_tokens_of_one_to_twelve() -> None:
    """Documents that predict 1 to 12 tokens are among those compared."""
    counts = {n: len(row_of([n]).labels) for n in (3, 7, 12, 40, 61, 62)}
    assert (min(counts.values()), max(counts.values())) == (1, 12)


# --- what must not matter, and what must -----------------------------------------------------------------------------


def replaced(batch: Microbatch, **changes: Tensor) -> Microbatch:
    return Microbatch(**{**{name: getattr(batch, name) for name in batch.__dataclass_fields__}, **changes})


def test_a_real_target_is_seen_by_later_queries_only() -> None:
    """Changing the j-th predicted token changes the logits of queries i > j, and of no other."""
    model, row = tiny_model(), row_of([50], probability=0.16)
    batch = collate([row])
    before, predicted = query_logits(model, batch), len(row.labels)
    order = row.streams.stages[-predicted:]  # of the queries, in text order
    assert predicted == 8
    for j in range(predicted):
        place = int(np.flatnonzero(row.streams.stages[:50] == j + 1)[0])
        ids = batch.input_ids.clone()
        ids[place] = (ids[place] + 7) % 200 + 5
        changed = (query_logits(model, replaced(batch, input_ids=ids)) - before).abs().amax(1) > 0
        assert changed.tolist() == (order > j).tolist()


def test_a_placeholder_is_seen_by_its_query() -> None:
    """Changing what the j-th placeholder shows changes the logits of all queries up to j."""
    model, row = tiny_model(), row_of([50], probability=0.16)
    batch, predicted = collate([row]), 8
    before, order = query_logits(model, batch), row.streams.stages[-predicted:]
    for place in range(50, 50 + predicted):
        ids = batch.input_ids.clone()
        ids[place] = (ids[place] + 7) % 200 + 5
        changed = (query_logits(model, replaced(batch, input_ids=ids)) - before).abs().amax(1) > 0
        assert changed[order <= order[place - 50]].all()


def test_the_order_of_the_others_does_not_matter() -> None:
    """Tokens that are not predicted may stand in any order, with their positions."""
    model, row = tiny_model(), row_of([50])
    others = np.flatnonzero(row.streams.stages[:50] == 0)
    shuffled = np.arange(50)
    shuffled[others] = np.random.default_rng(1).permutation(others)
    batch = collate([row])
    mixed = torch.arange(len(row.ids))
    mixed[:50] = torch.from_numpy(shuffled)
    moved = replaced(batch, input_ids=batch.input_ids[mixed], position_ids=batch.position_ids[mixed])
    torch.testing.assert_close(query_logits(model, moved), query_logits(model, batch), rtol=0, atol=2e-6)


def test_documents_do_not_see_each_other() -> None:
    """A document's logits are the same, bit for bit, whatever stands beside it in the row."""
    model = tiny_model()
    for other in (3, 44):
        row = row_of([20, other], seed=5)
        assert row.streams is not None
        alone = permuted_part(row, 20)
        both = query_logits(model, collate([row]))
        torch.testing.assert_close(query_logits(model, collate([alone])), both[: len(alone.labels)], rtol=0, atol=0)


def permuted_part(row: MaskedRow, size: int) -> MaskedRow:
    """Return the first document of a row, of so many tokens, as a row of its own."""
    rows, keys = int(row.streams.lengths[0]), int(row.lengths[0])
    predicted = rows - keys
    streams = type(row.streams)(
        row.streams.lengths[:1], row.streams.key_indices[:keys],
        row.streams.stages[:rows], row.streams.key_stages[:keys],
    )  # fmt: skip
    return MaskedRow(row.ids[:rows], row.lengths[:1], row.positions[:rows], row.label_positions[:predicted],
                     row.labels[:predicted], size, streams)  # fmt: skip


def test_one_state_for_each_kind_of_last_layer() -> None:
    """The last layer computed for all rows gives the same loss and gradients as for the queries alone."""
    model, batch = tiny_model(), batch_of(30, 9, 41)
    results = []
    for whole in (False, True):
        model.zero_grad()
        output = MlmObjective(model, NUM_TOKENS, full_last_layer=whole)(batch)
        output.loss_sum.backward()
        results.append((output, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(results[0][0].loss_sum, results[1][0].loss_sum)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("what", ["full", "selective"])
def test_recomputing_blocks_changes_no_bit(what: str) -> None:
    """Gradients with all three dropouts on are the same when blocks are computed again."""
    rates = dict.fromkeys(QUIET, 0.1)
    model, batch = tiny_model(**rates).train(), batch_of(30, 9, 41)
    grads = []
    for choice in (None, what):
        model.recompute(choice)
        torch.manual_seed(3)
        grads.append(run(model, batch)[2])
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_bf16_is_near_fp32() -> None:
    """Under autocast the loss is that of fp32 to bf16's precision, and gradients exist for every weight."""
    model, batch = tiny_model(), batch_of(30, 9, 41)
    exact = run(model, batch)[0]
    model.zero_grad()
    loss = MlmObjective(model, NUM_TOKENS, bf16=True)(batch).loss_sum
    loss.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=2e-2)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# --- choosing what is predicted --------------------------------------------------------------------------------------


def test_rate_holds_for_each_document() -> None:
    """Each document predicts 15 % of its ordinary tokens, rounded up or down, whatever the others' lengths."""
    lengths = np.array([20, 90, 4, 128])
    rows = [row_of(lengths.tolist(), seed=seed, probability=0.15) for seed in range(400)]
    counts = np.array([row.streams.lengths - row.lengths for row in rows])
    assert ((counts - 0.15 * (lengths - 2)) < 1).all()
    assert ((counts - 0.15 * (lengths - 2)) > -1).all()
    assert (counts.mean(0) / (lengths - 2)).tolist() == pytest.approx([0.15] * 4, rel=0.15)
    assert {row.num_tokens for row in rows} == {lengths.sum()}


def test_a_row_predicts_at_least_one_token() -> None:
    """However short its only document is."""
    assert {len(row_of([3], seed=seed, probability=0.15).labels) for seed in range(30)} == {1}


def test_rows_of_a_document_without_ordinary_tokens() -> None:
    """A document of special tokens alone predicts nothing and stays in the row."""
    ids = np.array([2, 3, 2, 50, 51, 52, 3])
    row = permuted_row(ids, np.array([2, 5]), masker(), numpy_rng(0, "mask"), placeholders=True)
    assert (row.streams.lengths - row.lengths).tolist() == [0, 1]
    assert collate([row]).num_labels == 1


@pytest.mark.parametrize("whole_word", [False, True])
def test_permutation(whole_word: bool) -> None:
    """Predicted tokens are distinct ordinary ones in random order; with whole words, words are whole but one."""
    rng, chosen = np.random.default_rng(0), masker(whole_word=whole_word)
    seen_orders, halves = set(), 0
    for _ in range(200):
        ids = np.r_[2, rng.integers(5, NUM_TOKENS, 60), 3]
        order = chosen.permute(ids, rng)
        assert len(order) == 12 == len(set(order.tolist()))
        assert not SPECIAL[ids[order]].any()
        seen_orders.add(tuple(np.argsort(order)))
        if whole_word:
            words = np.cumsum(~(ids >= 200) | (np.arange(62) == 1))
            cut = [w for w in set(words[order]) if set(np.flatnonzero((words == w) & ~SPECIAL[ids])) - set(order)]
            assert len(cut) <= 1
            halves += bool(cut)
    assert len(seen_orders) > 190
    assert halves > 20 or not whole_word


def test_whole_word_permutation_of_one_word() -> None:
    """A document that begins inside a word, or is one word, still gives a permutation."""
    ids = np.full(30, 250)
    assert len(set(masker(whole_word=True).permute(ids, np.random.default_rng(0)))) == 6


def test_queries_and_placeholders_show_the_same() -> None:
    """Placeholder and query of a token show one corruption: mask, random or the token itself, at the given rates."""
    row = row_of([128] * 200, probability=0.5, mask_prob=0.5, random_prob=0.3)
    rows, keys = row.streams.lengths, row.lengths
    ends = np.cumsum(rows)
    queries = np.concatenate([row.ids[e - (r - k) : e] for e, r, k in zip(ends, rows, keys, strict=True)])
    held = np.concatenate([row.ids[e - 2 * (r - k) : e - (r - k)] for e, r, k in zip(ends, rows, keys, strict=True)])
    assert np.array_equal(queries, held)
    assert np.mean(queries == MASK) == pytest.approx(0.5, abs=0.02)
    assert np.mean((queries != MASK) & (queries != row.labels)) == pytest.approx(0.3, abs=0.02)
    assert np.mean(queries == row.labels) == pytest.approx(0.2, abs=0.02)


def test_objective_of_a_config() -> None:
    """An MPNet learns its own objective unless told otherwise; a NeoBERT masked tokens."""
    assert RunConfig().trained_objective == "mlm"
    assert RunConfig(model=MpnetConfig()).trained_objective == "mpnet"
    assert RunConfig(model=MpnetConfig(), objective="mlm").trained_objective == "mlm"


@pytest.mark.parametrize("row_length", [32, 64])
def test_rate_on_real_text(store: Path, row_length: int) -> None:
    """On Python's documentation 15 % of what can be predicted is, within half a percent, packed and whole words."""
    changes = {"model": MpnetConfig(), "dataset.max_seq_length": row_length, "datacollator.whole_word": True,
               "datacollator.pack_sequences": True}  # fmt: skip
    config = RunConfig().changed(changes)
    opened = TokenStore.open(store)
    tokenizer = EncoderTokenizer.load(opened.tokenizer_dir)
    rows, chosen = packed_rows(opened, "train", tokenizer, config), Masker.of(tokenizer, config)
    predicted = predictable = 0
    for index in range(2000):
        ids, lengths = rows.row(index)
        row = mask_row(ids, lengths, chosen, numpy_rng(0, "mask", 0, index))
        predicted += len(row.labels)
        predictable += int((~chosen.is_special[ids]).sum())
    assert predicted / predictable == pytest.approx(0.15, abs=0.005)
