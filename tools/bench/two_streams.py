"""Measure a step of masked and permuted training (MPNet) against the way it is done elsewhere: time and memory.

    python -m enc.tools.bench.two_streams                        # 6 x 384 on the CPU, fp32 and bf16
    python -m enc.tools.bench.two_streams --size base --json     # MPNet-base
    python -m enc.tools.bench.two_streams --threads 1 --clock cpu

The rival is annotated-mpnet's step: documents padded to the longest of their batch, the permuted tokens, targets and
placeholders side by side, one additive matrix of bias and mask for each document and head, attention through PyTorch's
SDPA, two streams one after the other. It has the same weights, the same documents with the same permutations and
predicted tokens, the same head, loss, optimizer (fused AdamW with clipping), dropout and threads, and it gives the same
loss (a test compares them). It is spared two things that annotated-mpnet does: the matrix is made once a step, not in
every layer, and the loss is enc's.

    padded      every document predicts 15 % of its tokens, as with us
    shortest    as annotated-mpnet has it: all documents of a batch predict as many tokens as the shortest, which is
                less work and less learnt

Text: Python's documentation as it comes, or put together to documents with a median of `--median-tokens` tokens (400 is
about that of web text), cut at 512 tokens, batches of 16 documents in random order; on our side those of a step lie one
after the other in one flat batch. Batches are made before the clock starts. A step is one
update from `--documents` documents. Sides run in turn; a ratio is the median of the ratios within a round. Memory is
the most that one step allocates beyond weights, gradients and moments.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from enc.encoder.config.schema import RunConfig
from enc.encoder.data.batches import collate
from enc.encoder.data.masking import MaskedRow, Masker
from enc.encoder.data.permutation import permuted_row
from enc.encoder.data.store import TokenStore
from enc.encoder.data.tokenizer import EncoderTokenizer
from enc.encoder.keyed import numpy_rng
from enc.encoder.models.build import init_weights
from enc.encoder.models.mpnet.config import MpnetConfig
from enc.encoder.models.mpnet.model import MpnetForMaskedLM
from enc.encoder.models.registry import parameters_of
from enc.encoder.models.vocabulary import padded_vocab_size
from enc.encoder.objectives.mlm import MlmObjective
from enc.kernels.attention_rules import relative_buckets
from enc.kernels.masked_ce import IGNORE_INDEX, masked_ce
from enc.tools.bench.clocks import Work, extra_bytes, in_turn, make_timer, spread
from enc.tools.bench.machine import machine, machine_lines
from enc.tools.bench.step import make_store

SIZES: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1536},
    "base": {},
}
LENGTH, BATCH = 512, 16
PACKAGES = ("torch", "enc-toolkit")


# --- the rival -------------------------------------------------------------------------------------------------------


class Padded(NamedTuple):
    """A batch of B documents, L places of text with P of them predicted, then P placeholders and P queries."""

    input_ids: Tensor  # (B, L + 2P)
    positions: Tensor  # (B, L + 2P)
    targets: Tensor  # (B, P), IGNORE_INDEX where a document predicts fewer
    is_pad: Tensor  # (B, L + P): keys that are none


def pad(documents: list[MaskedRow], pad_id: int) -> Padded:
    """Lay permuted documents (``permuted_row``, one each) out as annotated-mpnet does."""
    predicted = max(len(document.labels) for document in documents)
    others = max(document.num_tokens - len(document.labels) for document in documents)
    ids = np.full((len(documents), others + 3 * predicted), pad_id)
    positions, targets = np.zeros_like(ids), np.full((len(documents), predicted), IGNORE_INDEX)
    for row, document in enumerate(documents):
        assert document.streams is not None
        size, count = document.num_tokens, len(document.labels)
        when = document.streams.stages[:size]
        order = np.argsort(when, kind="stable")  # others in the order of the text, then targets as they are predicted
        queries = size + count + np.argsort(document.streams.stages[size + count :])
        shown = document.ids[queries]
        blocks: list[tuple[int, np.ndarray, np.ndarray | None]] = [(0, order[: size - count], None)]
        blocks += [(others + predicted - count, order[size - count :], None)]
        blocks += [(others + copy * predicted - count, order[size - count :], shown) for copy in (2, 3)]
        for start, places, instead in blocks:
            part = slice(start, start + len(places))
            ids[row, part] = document.ids[places] if instead is None else instead
            positions[row, part] = places
        targets[row, predicted - count :] = document.ids[order[size - count :]]
    is_pad = np.ones((len(documents), others + 2 * predicted), bool)
    for row, document in enumerate(documents):
        count = len(document.labels)
        is_pad[row, : document.num_tokens - count] = False
        for block in (1, 2):
            end = others + block * predicted
            is_pad[row, end - count : end] = False
    return Padded(*map(torch.from_numpy, (ids, positions, targets, is_pad)))


def padded_loss(model: MpnetForMaskedLM, config: MpnetConfig, batch: Padded) -> Tensor:
    """Return the sum of the cross-entropy over the predicted tokens, by two streams over padded documents."""
    trunk, predicted, dropout_p = model.mpnet, batch.targets.shape[1], model.mpnet.dropout_p
    tables = trunk.embeddings
    x = tables.word_embeddings(batch.input_ids) + tables.position_embeddings(batch.positions + 2)
    x = F.dropout(tables.LayerNorm(x), dropout_p, model.training)  # (B, L + 2P, E)
    content, queries = x[:, :-predicted], x[:, -predicted:]
    masks = _dense_masks(trunk.encoder.relative_attention_bias.weight, config, batch)
    for block in trunk.encoder.layer:
        attn, normed = block.attention.attn, block.attention.LayerNorm(content) if block.pre_norm else content
        keys, values = (_heads(project(normed), block.num_heads) for project in (attn.k, attn.v))
        content, queries = (
            _layer(block, stream, keys, values, mask, model.training)
            for stream, mask in zip((content, queries), masks, strict=True)
        )
    hidden = trunk.encoder.LayerNorm(queries) if config.normalize_before else queries
    hidden = model.transform(hidden.flatten(0, 1))
    return masked_ce(hidden, model.head_weight, model.head_bias, batch.targets.flatten(), model.num_tokens).loss


def _layer(block: Any, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor, training: bool) -> Tensor:
    attention, output = block.attention, block.output
    q = _heads(attention.attn.q(attention.LayerNorm(x) if block.pre_norm else x), block.num_heads)
    dropout_p = block.attention_dropout_p if training else 0.0
    mixed = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask.to(q.dtype), dropout_p=dropout_p)
    attended = F.dropout(attention.attn.o(mixed.transpose(1, 2).flatten(2)), block.dropout_p, training)
    x = x + attended if block.pre_norm else F.layer_norm(x + attended, x.shape[-1:], *_affine(attention.LayerNorm))
    if block.pre_norm:
        y: Tensor = x + block.feed_forward(output.LayerNorm(x))
        return y
    return F.layer_norm(x + block.feed_forward(x), x.shape[-1:], *_affine(output.LayerNorm))


def _affine(norm: Any) -> tuple[Tensor, Tensor, float]:
    return norm.weight, norm.bias, norm.eps


def _heads(x: Tensor, num_heads: int) -> Tensor:
    heads: Tensor = x.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # (B, H, n, D)
    return heads


def _dense_masks(table: Tensor, config: MpnetConfig, batch: Padded) -> tuple[Tensor, Tensor]:
    """Return what is added to the scores of content and queries, (B, H, L + P, L + P) and (B, H, P, L + P)."""
    predicted, keys = batch.targets.shape[1], batch.is_pad.shape[1]
    places = batch.positions[:, :keys]
    buckets = relative_buckets(places[:, None, :] - places[:, :, None], len(table), config.max_distance)
    bias = table[buckets].permute(0, 3, 1, 2)
    square = torch.ones(predicted, predicted, dtype=torch.bool)
    rows = torch.zeros(keys, keys, dtype=torch.bool)  # True: blocked
    text = keys - predicted
    real, held = slice(text - predicted, text), slice(text, keys)
    rows[:, real] = True
    rows[real, real], rows[real, held] = square.triu(1), square.tril()
    of_queries = torch.zeros(predicted, keys, dtype=torch.bool)
    of_queries[:, real], of_queries[:, held] = square.triu(), square.tril(-1)
    blocked, blocked_queries = (mask | batch.is_pad[:, None, None, :] for mask in (rows, of_queries))
    return bias.masked_fill(blocked, -torch.inf), bias[:, :, -predicted:].masked_fill(blocked_queries, -torch.inf)


# --- the comparison --------------------------------------------------------------------------------------------------


def documents_of(store: TokenStore, tokenizer: EncoderTokenizer, masker: Masker, count: int) -> list[MaskedRow]:
    """Return so many documents in random order, each cut to one piece and permuted."""
    texts, rng = store.split("train"), np.random.default_rng(0)
    special = [i for i in (tokenizer.cls_id, tokenizer.sep_id) if i is not None]
    rows = []
    for index in rng.permutation(len(texts))[:count]:
        ids = np.r_[special[:1], texts[int(index)][: LENGTH - len(special)].astype(np.int64), special[1:]]
        rows.append(permuted_row(ids, np.array([len(ids)]), masker, numpy_rng(0, "mask", int(index)), True))
    return rows


def shortest(documents: list[MaskedRow], masker: Masker) -> list[MaskedRow]:
    """Return the documents of a batch with as few predicted tokens as the shortest has."""
    fewest = min(len(document.labels) for document in documents)

    class Few(Masker):
        def permute(self, ids: np.ndarray, rng: np.random.Generator, least: int = 0) -> np.ndarray:
            return super().permute(ids, rng, fewest)[-fewest:]

    few = Few(**{name: getattr(masker, name) for name in masker.__dataclass_fields__})
    return [
        permuted_row(d.ids[: d.num_tokens], np.array([d.num_tokens]), few, numpy_rng(0, "few", i), True)
        for i, d in enumerate(documents)
    ]


def compare(size: str, dtype: str, count: int, rounds: int, clock: str, store: Path) -> dict[str, Any]:
    """Return time and memory of a step of each side."""
    opened = TokenStore.open(store)
    tokenizer = EncoderTokenizer.load(opened.tokenizer_dir)
    vocab = padded_vocab_size(tokenizer.num_tokens)
    config = MpnetConfig(**SIZES[size], vocab_size=vocab, pad_token_id=tokenizer.pad_id)
    masker = Masker.of(tokenizer, RunConfig(model=config))
    documents = documents_of(opened, tokenizer, masker, count)
    num_tokens = sum(document.num_tokens for document in documents)
    batches = [documents[start : start + BATCH] for start in range(0, count, BATCH)]
    model = MpnetForMaskedLM(config, tokenizer.num_tokens).train()
    init_weights(model, parameters_of(config), 0)
    objective = MlmObjective(model, tokenizer.num_tokens, bf16=dtype == "bf16")
    flat = collate(documents)
    layouts = {
        "padded": [pad(batch, tokenizer.pad_id) for batch in batches],
        "shortest": [pad(shortest(batch, masker), tokenizer.pad_id) for batch in batches],
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def losses(side: str) -> list[Callable[[], Tensor]]:
        if side == "enc":
            return [lambda: objective(flat).loss_sum]
        return [partial(_cast, dtype, model, config, batch) for batch in layouts[side]]

    def step(side: str) -> list[Tensor]:
        for loss in losses(side):
            (loss() / flat.num_labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return []

    works: dict[str, Work] = {side: partial(step, side) for side in ("enc", *layouts)}
    seconds = in_turn(works, rounds, make_timer(torch.device("cpu"), clock))
    memory = {side: extra_bytes(work, torch.device("cpu")) for side, work in works.items()}
    labels = {side: sum(int((b.targets != IGNORE_INDEX).sum()) for b in batches) for side, batches in layouts.items()}
    places = {side: sum(b.input_ids.numel() for b in batches) for side, batches in layouts.items()}
    return {
        "tokens": num_tokens,
        "sides": {
            side: {
                "step_s": spread(times),
                "tokens_per_s": num_tokens / statistics.median(times),
                "ratio": statistics.median(t / o for t, o in zip(times, seconds["enc"], strict=True)),
                "memory_mb": memory[side] / 1e6,
                "predicted": labels.get(side, flat.num_labels) / num_tokens,
                "states": places.get(side, flat.input_ids.numel()),
            }
            for side, times in seconds.items()
        },
    }


def _cast(dtype: str, model: MpnetForMaskedLM, config: MpnetConfig, batch: Padded) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
        return padded_loss(model, config, batch)


def table(report: dict[str, Any]) -> str:
    """Return the report as lines of at most 80 characters."""
    lines = machine_lines(report["machine"])
    for dtype, found in report["results"].items():
        lines += ["", f"{dtype}, {found['tokens']:,} tokens a step", ""]
        lines.append(f"{'':<10}{'tokens/s':>10}{'enc is':>9}{'step s':>9}{'MB':>9}{'enc has':>9}{'predicted':>11}")
        ours = found["sides"]["enc"]
        for name, side in found["sides"].items():
            faster = f"{side['ratio']:.2f} x" if name != "enc" else ""
            share = f"1/{side['memory_mb'] / ours['memory_mb']:.1f}" if name != "enc" else ""
            lines.append(
                f"{name:<10}{side['tokens_per_s']:>10,.0f}{faster:>9}{side['step_s']['median']:>9.2f}"
                f"{side['memory_mb']:>9,.0f}{share:>9}{100 * side['predicted']:>9.1f} %"
            )
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--dtype", default="fp32,bf16", help="fp32, bf16")
    parser.add_argument("--documents", type=int, default=64, help="of a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--median-tokens", type=int, help="of a document of the default store")
    parser.add_argument("--store", type=Path, help="token store; Python's documentation by default")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which counts memory, would speak on stderr
    if asked.threads:
        torch.set_num_threads(asked.threads)
    with tempfile.TemporaryDirectory(prefix="enc-bench-") as folder:
        store = asked.store or make_store(Path(folder) / "store", 8192, asked.median_tokens)
        results = {
            dtype: compare(asked.size, dtype, asked.documents, asked.rounds, asked.clock, store)
            for dtype in asked.dtype.split(",")
        }
    report = {"machine": machine(torch.device("cpu"), PACKAGES), "size": asked.size, "results": results}
    print(json.dumps(report, indent=1) if asked.json else table(report))


if __name__ == "__main__":
    main()
