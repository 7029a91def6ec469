"""Measure enc's training step against Hugging Face's `Trainer` with ModernBERT: useful tokens a second.

    python -m enc.tools.bench.step                                    # both dtypes, under five minutes
    python -m enc.tools.bench.step --dtype fp32 --rows 16 --store tokenized_data/quickstart --json

Four sides train a masked language model of the same depth, width, heads, feed-forward width and vocabulary on the same
documents, with the same optimizer (fused AdamW, clipping at 1.0), dtype, threads and share of masked tokens:

    enc        the loop of `enc launch` itself (`encoder/train.py`) on packed rows
    natural    Trainer as it is usually run: one document a row, cut at the row length, padded to the longest of its
               microbatch, rows in random order
    grouped    the same with `train_sampling_strategy="group_by_length"`
    full       Trainer on rows without any padding: the text of enc's packed rows, cut at every row length

A useful token is one that is not padding, special tokens included, on every side. An optimizer step has about the same
number of them everywhere: the natural and grouped sides reach it by accumulating microbatches of as many rows as enc's,
which pads less than one large batch would. Where a choice was free it favours Trainer: its documents are tokenised and
in memory with their special-token masks, and it neither logs, reports, saves nor filters its loss. Nothing is
compiled. ModernBERT attends globally in every layer, as enc does, which is faster on a CPU than its default windows.

The sides run one after the other in one process, round after round, in turning order. In each round a side first takes
a step that is not counted, and the first round is not counted at all. A rate is the median over rounds; a ratio is the
median of the ratios within a round. `cpu` is the share of its threads' time that a side got: well below 100 % other
processes took part in the figure. On a machine that is never quiet, `--threads 1 --clock cpu` counts processor time.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from enc.encoder import train
from enc.encoder.build import open_data
from enc.encoder.config import RunConfig
from enc.encoder.config_load import load_config
from enc.encoder.data.preprocess import preprocess
from enc.encoder.data.store import TokenStore
from enc.encoder.data.tokenizer import EncoderTokenizer
from enc.encoder.faults import StopFlag
from enc.encoder.metrics import RunLog
from enc.encoder.ranks import Ranks
from enc.encoder.sizes import feed_forward_width, num_parameters, padded_vocab_size
from enc.encoder.start import build, open_heartbeat

WARM_UP_STEPS = 1
NAMES = {
    "enc": "enc, packed rows",
    "natural": "Trainer, natural",
    "grouped": "Trainer, grouped",
    "full": "Trainer, full rows",
}


@dataclass(frozen=True)
class Block:
    """What a side did in one round, its warm-up left out."""

    tokens: int  # useful ones
    places: int  # padding included
    steps: int
    seconds: float
    cpu_seconds: float  # of this process, all threads

    def rate(self, clock: str) -> float:
        """Return useful tokens a second by the clock on the wall or by processor time."""
        return self.tokens / (self.seconds if clock == "wall" else self.cpu_seconds)


Side = Callable[[int, int], Block]  # (round, counted steps) -> what was done


@dataclass(frozen=True)
class Mark:
    """The clocks after a step, and what was done until then: tokens on enc's side, microbatches on Trainer's."""

    wall: float
    cpu: float
    done: int

    @classmethod
    def now(cls, done: int) -> "Mark":
        return cls(time.perf_counter(), time.process_time(), done)


# --- enc -------------------------------------------------------------------------------------------------------------


class _Enough(Exception):
    """Leaves the training loop after the last step of a block."""


class _ClockedLog(RunLog):
    """A run's log that notes the time and the token count after each step, and stops the loop."""

    def watch(self, state: train.TrainState, steps: int) -> None:
        self.state, self.left = state, steps
        self.marks: list[Mark] = []

    def advance(self, step: int) -> None:
        super().advance(step)
        self.marks.append(Mark.now(self.state.tokens))
        if len(self.marks) == self.left:
            raise _Enough


def enc_side(config: RunConfig, folder: Path) -> Side:
    """Return enc's side: the real loop on a real run, its log apart."""
    run = build(folder, Ranks(0, 1, 0), config, StopFlag(), open_heartbeat(folder, 0, config))
    run.log = log = _ClockedLog(folder, config, 1, True, 0)

    def block(_round: int, steps: int) -> Block:
        log.watch(run.state, WARM_UP_STEPS + steps)
        try:
            train.train(run)
        except _Enough:
            start, end = log.marks[WARM_UP_STEPS - 1], log.marks[-1]
        places = steps * run.split.rows_per_step * config.row_length
        return Block(end.done - start.done, places, steps, end.wall - start.wall, end.cpu - start.cpu)

    return block


# --- Trainer ---------------------------------------------------------------------------------------------------------

Row = dict[str, list[int]]


def natural_rows(config: RunConfig, tokenizer: EncoderTokenizer) -> list[Row]:
    """Return the training documents as `run_mlm.py` makes them: [CLS] text [SEP], cut at the row length."""
    before = [tokenizer.cls_id] if tokenizer.cls_id is not None else []
    after = [tokenizer.sep_id] if tokenizer.sep_id is not None else []
    room = config.row_length - len(before) - len(after)
    documents = TokenStore.open(Path(config.dataset.path)).split("train")
    return [_row([*before, *documents[i][:room].tolist(), *after], tokenizer) for i in range(len(documents))]


def full_rows(config: RunConfig, tokenizer: EncoderTokenizer) -> list[Row]:
    """Return the text of enc's packed rows, one after the other, cut at every row length."""
    packed = open_data(config).train
    ids = np.concatenate([packed.row(i)[0] for i in range(len(packed))])
    length = config.row_length
    return [_row(ids[i : i + length].tolist(), tokenizer) for i in range(0, len(ids) - length + 1, length)]


def _row(ids: list[int], tokenizer: EncoderTokenizer) -> Row:
    special = set(tokenizer.special_ids)
    return {"input_ids": ids, "special_tokens_mask": [int(i in special) for i in ids]}


def modernbert(config: RunConfig, tokenizer: EncoderTokenizer, sparse_prediction: bool) -> Any:
    """Return a ModernBERT of the size of enc's model, with PyTorch's SDPA."""
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    model = config.model
    settings = ModernBertConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=feed_forward_width(model),
        num_hidden_layers=model.num_hidden_layers,
        num_attention_heads=model.num_attention_heads,
        max_position_embeddings=config.row_length,
        layer_types=["full_attention"] * model.num_hidden_layers,
        pad_token_id=tokenizer.pad_id,
        cls_token_id=tokenizer.cls_id,
        sep_token_id=tokenizer.sep_id,
        bos_token_id=tokenizer.cls_id,
        eos_token_id=tokenizer.sep_id,
        sparse_prediction=sparse_prediction,
    )
    return ModernBertForMaskedLM._from_config(settings, attn_implementation="sdpa")


def trainer_side(
    config: RunConfig, tokenizer: EncoderTokenizer, rows: list[Row], folder: Path, strategy: str, sparse: bool
) -> Side:
    """Return a Trainer on these rows; it accumulates microbatches to about the tokens of enc's step."""
    from transformers import (
        DataCollatorForLanguageModeling,
        PreTrainedTokenizerFast,
        PrinterCallback,
        Trainer,
        TrainingArguments,
    )

    trainer = config.trainer
    fast = PreTrainedTokenizerFast.from_pretrained(TokenStore.open(Path(config.dataset.path)).tokenizer_dir)
    collator = DataCollatorForLanguageModeling(fast, mlm_probability=config.datacollator.mlm_probability)
    microbatch = trainer.per_device_train_batch_size
    tokens = config.row_length * microbatch
    mean = statistics.fmean(len(row["input_ids"]) for row in rows)

    def block(round_: int, steps: int) -> Block:
        arguments = TrainingArguments(
            output_dir=str(folder),
            use_cpu=True,
            bf16=trainer.mixed_precision == "bf16",
            max_steps=WARM_UP_STEPS + steps,
            per_device_train_batch_size=microbatch,
            gradient_accumulation_steps=max(1, round(tokens / (mean * microbatch))),
            train_sampling_strategy=strategy,
            optim="adamw_torch_fused",
            learning_rate=config.optimizer.lr,
            weight_decay=config.optimizer.weight_decay,
            adam_beta1=config.optimizer.betas[0],
            adam_beta2=config.optimizer.betas[1],
            max_grad_norm=trainer.gradient_clipping or 0.0,
            dataloader_num_workers=config.dataset.num_workers or 0,
            dataloader_pin_memory=False,
            remove_unused_columns=False,  # it would take away the special-token masks, which save the collator work
            seed=config.seed + round_,
            logging_strategy="no",
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        clock = _step_clock()
        hf = modernbert(config, tokenizer, sparse)
        masks: list[torch.Tensor] = []
        hf.register_forward_pre_hook(lambda _, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True)
        clock.count = masks
        hf_trainer = Trainer(hf, arguments, data_collator=collator, train_dataset=rows, callbacks=[clock])
        hf_trainer.remove_callback(PrinterCallback)
        hf_trainer.train()
        start, end = clock.marks[WARM_UP_STEPS - 1], clock.marks[-1]
        counted = masks[start.done : end.done]
        useful, places = sum(int(mask.sum()) for mask in counted), sum(mask.numel() for mask in counted)
        return Block(useful, places, steps, end.wall - start.wall, end.cpu - start.cpu)

    return block


def _step_clock() -> Any:
    """Return a callback that notes the time and the number of microbatches after each optimizer step."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        count: list[torch.Tensor]

        def __init__(self) -> None:
            self.marks: list[Mark] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.marks.append(Mark.now(len(self.count)))

    return Clock()


# --- the comparison --------------------------------------------------------------------------------------------------


def make_store(folder: Path, vocab_size: int) -> Path:
    """Make the token store of Python's documentation, as the `quickstart` recipe does but for the vocabulary."""
    settings = {"dataset.pre_tokenize_output": str(folder), "tokenizer.train.vocab_size": vocab_size}
    config = load_config("quickstart", settings).config
    return preprocess(config.dataset, config.tokenizer, config.seed)


def run_config(args: argparse.Namespace, dtype: str, store: Path, folder: Path) -> RunConfig:
    """Return the run config of enc's side, resolved as a plan would."""
    tokenizer = EncoderTokenizer.load(TokenStore.open(store).tokenizer_dir)
    settings = {
        "model.hidden_size": args.width,
        "model.num_hidden_layers": args.layers,
        "model.num_attention_heads": args.heads,
        "model.intermediate_size": args.intermediate_size or 4 * args.width,
        "model.max_position_embeddings": args.row_length,
        "dataset.max_seq_length": args.row_length,
        "dataset.path": str(store),
        "dataset.num_workers": args.workers,
        "datacollator.mlm_probability": args.masked,
        "trainer.output_dir": str(folder),
        "trainer.use_cpu": True,
        "trainer.mixed_precision": "bf16" if dtype == "bf16" else "no",
        "trainer.per_device_train_batch_size": args.rows,
        "trainer.eval_strategy": "no",
        "trainer.save_strategy": "no",
        "trainer.max_steps": 1_000_000,
        "trainer.logging_steps": 1_000_000,
        "trainer.disable_tqdm": True,
    }
    config = load_config("quickstart", settings).config
    resolved = {
        "model.vocab_size": padded_vocab_size(tokenizer.num_tokens),
        "model.pad_token_id": tokenizer.pad_id,
        "trainer.global_batch_size": args.rows,
    }
    return config.changed(resolved)


def make_sides(args: argparse.Namespace, config: RunConfig, folder: Path) -> dict[str, Side]:
    """Build what is asked for."""
    tokenizer = EncoderTokenizer.load(TokenStore.open(Path(config.dataset.path)).tokenizer_dir)
    sides: dict[str, Side] = {"enc": enc_side(config, folder)}
    rows = {"natural": natural_rows(config, tokenizer), "full": full_rows(config, tokenizer)}
    for name in args.sides:
        strategy = "group_by_length" if name == "grouped" else "random"
        side_rows = rows["full" if name == "full" else "natural"]
        sides[name] = trainer_side(config, tokenizer, side_rows, folder, strategy, args.sparse_prediction)
    return sides


def measure(sides: dict[str, Side], steps: int, seconds: float, min_rounds: int, clock: str) -> dict[str, list[Block]]:
    """Run the sides in turn until the time is up, at least so many rounds, after one that is not counted."""
    blocks: dict[str, list[Block]] = {name: [] for name in sides}
    for side in sides.values():
        side(0, 0)
    start = time.perf_counter()
    done = 0
    while done < min_rounds or (time.perf_counter() - start) * (done + 1) / done < seconds:
        done += 1
        for name in sides if done % 2 else reversed(sides):
            blocks[name].append(sides[name](done, steps))
        rates = ", ".join(f"{name} {blocks[name][-1].rate(clock):,.0f}" for name in sides)
        print(f"round {done}: {rates} tokens/s", file=sys.stderr, flush=True)
    return blocks


def summary(blocks: dict[str, list[Block]], clock: str) -> dict[str, Any]:
    """Return medians and spreads of rates, and of enc's rate over each other's, round by round."""
    threads, result = torch.get_num_threads(), {}
    for name, runs in blocks.items():
        result[name] = {
            "tokens_per_s": _spread([run.rate(clock) for run in runs]),
            "fill": sum(run.tokens for run in runs) / sum(run.places for run in runs),
            "cpu_share": sum(run.cpu_seconds for run in runs) / sum(run.seconds for run in runs) / threads,
            "tokens_per_step": sum(run.tokens for run in runs) / sum(run.steps for run in runs),
            "blocks": [asdict(run) for run in runs],
        }
        if name != "enc":
            pairs = zip(blocks["enc"], runs, strict=True)
            result[name]["enc_is_times"] = _spread([ours.rate(clock) / theirs.rate(clock) for ours, theirs in pairs])
    return result


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def machine() -> dict[str, Any]:
    """Return what the figures depend on outside of this repository."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    found = {name.strip(): value.strip() for name, value in fields.items()}
    flags = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in found.get("flags", "").split()]
    return {
        "cpu": found.get("model name", platform.machine()),
        "family_model": f"{found.get('cpu family', '?')}/{found.get('model', '?')}",
        "flags": flags,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate", "enc-toolkit")},
        "python": platform.python_version(),
    }


def table(report: dict[str, Any]) -> str:
    """Return the report as text of at most 80 columns."""
    host, model, names = report["machine"], report["model"], report["machine"]["versions"]
    lines = [
        f"{host['cpu']}{''.join(f', {flag}' for flag in host['flags'])}, {host['cores']} cores, "
        f"{host['threads']} threads",
        ", ".join(f"{name} {number}" for name, number in names.items()),
        f"{model['layers']} x {model['width']}, {model['heads']} heads, feed-forward {model['feed_forward']}, "
        f"vocabulary {model['vocabulary']}, masked {report['masked']:g}",
        f"parameters: enc {model['enc_parameters'] / 1e6:.2f} M, ModernBERT {model['hf_parameters'] / 1e6:.2f} M"
        + (", sparse_prediction" if report["sparse_prediction"] else ""),
        f"microbatches of {report['rows']} rows of {report['row_length']}, {report['workers']} batch workers, "
        f"{report['rounds']} rounds, {report['clock']} time",
    ]
    lines = [textwrap.fill(line, 80) for line in lines]
    head = f"{'dtype':5} {'side':18} {'tokens/s':>8} {'(range)':>13} {'fill':>5} {'cpu':>5}  enc is"
    lines += ["", head]
    for dtype, sides in report["results"].items():
        lines += [_table_line(dtype, NAMES[name], side) for name, side in sides.items()]
    return "\n".join(lines)


def _table_line(dtype: str, name: str, side: dict[str, Any]) -> str:
    rate, ratio = side["tokens_per_s"], side.get("enc_is_times")
    line = f"{dtype:5} {name:18} {rate['median']:8,.0f} {rate['min']:6,.0f}-{rate['max']:<6,.0f} "
    line += f"{side['fill']:5.0%} {side['cpu_share']:5.0%}"
    return line + (f"  {ratio['median']:.2f} x ({ratio['min']:.2f}-{ratio['max']:.2f})" if ratio else "")


def compare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure every dtype asked for and return the report."""
    store = Path(args.store) if args.store else make_store(folder / "store", args.vocab_size)
    results: dict[str, Any] = {}
    for dtype in args.dtype:
        print(f"{dtype}:", file=sys.stderr, flush=True)
        config = run_config(args, dtype, store, folder / dtype)
        (folder / dtype).mkdir()
        sides = make_sides(args, config, folder / dtype)
        seconds = 60 * args.minutes / len(args.dtype)
        results[dtype] = summary(measure(sides, args.steps, seconds, args.min_rounds, args.clock), args.clock)
    tokenizer = EncoderTokenizer.load(TokenStore.open(store).tokenizer_dir)
    model = {
        "layers": args.layers,
        "width": args.width,
        "heads": args.heads,
        "feed_forward": feed_forward_width(config.model),
        "vocabulary": config.model.vocab_size,
        "enc_parameters": num_parameters(config.model),
        "hf_parameters": modernbert(config, tokenizer, args.sparse_prediction).num_parameters(),
    }
    rounds = min(len(side["blocks"]) for sides in results.values() for side in sides.values())
    asked = {
        name: getattr(args, name) for name in ("rows", "row_length", "masked", "workers", "clock", "sparse_prediction")
    }
    return {"machine": machine(), "model": model, **asked, "rounds": rounds, "results": results}


def main() -> None:
    """Parse the command line, measure, print the table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384, help="hidden size")
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--intermediate-size", type=int, help="before the 2/3 rule; 4 x width by default")
    parser.add_argument("--rows", type=int, default=8, help="rows of a microbatch; enc's step is one microbatch")
    parser.add_argument("--row-length", type=int, default=512)
    parser.add_argument("--masked", type=float, default=0.2, help="share of masked tokens")
    parser.add_argument("--dtype", nargs="+", default=["bf16", "fp32"], choices=["bf16", "fp32"])
    parser.add_argument("--sides", nargs="*", default=["natural", "grouped", "full"], choices=list(NAMES)[1:])
    parser.add_argument("--sparse-prediction", action="store_true", help="ModernBERT computes labelled logits only")
    parser.add_argument("--threads", type=int, help="of PyTorch; its own choice by default")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: processor time, for --threads 1")
    parser.add_argument("--workers", type=int, default=0, help="batch workers of every side")
    parser.add_argument("--steps", type=int, default=2, help="counted optimizer steps of a side in a round")
    parser.add_argument("--min-rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=4, help="time of all rounds, split over the dtypes")
    parser.add_argument("--store", help="token store; by default one of Python's documentation is made")
    parser.add_argument("--vocab-size", type=int, default=8192, help="of the tokenizer trained for the default store")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if args.threads:
        torch.set_num_threads(args.threads)
    prose = contextlib.redirect_stdout(sys.stderr)  # libraries print there
    with prose, tempfile.TemporaryDirectory(prefix="enc-bench-") as folder:
        report = compare(args, Path(folder))
    print(json.dumps(report, indent=1) if args.json else table(report))


if __name__ == "__main__":
    main()
