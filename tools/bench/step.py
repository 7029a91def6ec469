"""Measure enc's training step against Hugging Face's `Trainer` with ModernBERT: useful tokens a second.

    enc bench step                                     # on the GPU where there is one, else on the CPU
    enc bench step my.yaml --against full --json       # the size, batch and optimizer of a config of yours
    python -m enc.tools.bench.step                     # the CPU's default: both dtypes, under five minutes
    python -m enc.tools.bench.step --dtype fp32 --rows 16 --store tokenized_data/quickstart --json

The sides train a masked language model of the same depth, width, heads, feed-forward width and vocabulary on the same
documents, with the same optimizer (fused AdamW, clipping as in the config), dtype, threads and share of masked tokens:

    enc        the loop of `enc launch` itself (`encoder/run/train.py`) on packed rows
    natural    Trainer as it is usually run: one document a row, cut at the row length, padded to the longest of its
               microbatch, rows in random order
    grouped    the same with `train_sampling_strategy="group_by_length"`
    full       Trainer on rows without any padding: the text of enc's packed rows, cut at every row length
    natural-compiled, full-compiled   the same with `torch_compile=True`

A useful token is one that is not padding, special tokens included, on every side. An optimizer step has about the same
number of them everywhere: the natural and grouped sides reach it by accumulating microbatches of as many rows as enc's,
which pads less than one large batch would. Where a choice was free it favours Trainer: its documents are tokenised and
in memory with their special-token masks, it neither logs, reports, saves nor filters its loss, and it may use
algorithms that give other bits each time, which enc does not. ModernBERT attends globally in every layer, as enc does,
which is faster on a CPU than its default windows.

On a CPU the model is 6 x 384 by default, on a GPU that of the recipe `neobert-250m`. The default documents are those of
Python's documentation; on a GPU they are put together to the lengths of web text, log-normal with a median of 400
tokens. Text of your own: `--store`.

The sides run one after the other in one process, round after round, in turning order. In each round a side first takes
a step that is not counted (three on a GPU), and the first round is not counted at all. A rate is the median over
rounds; a ratio is the median of the ratios within a round. `cpu` is the share of its threads' time that a side got:
well below 100 % other processes took part in the figure. On a machine that is never quiet, `--threads 1 --clock cpu`
counts processor time.

MFU counts six operations a matrix parameter and token, attention over the real length of documents (on rows without
padding that Trainer does not tell apart, over the row), and the output matrix for labels only, on every side, against
the GPU's data sheet; on a CPU against a matrix product measured at start. `peak` is
the GPU memory that torch allocated.
"""

import argparse
import contextlib
import gc
import json
import math
import os
import random
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from enc.encoder.config.load import load_config
from enc.encoder.config.schema import RunConfig
from enc.encoder.data.loader import num_workers
from enc.encoder.data.preprocess import preprocess
from enc.encoder.data.sources.python_docs import python_docs
from enc.encoder.data.store import TokenStore
from enc.encoder.data.tokenizer import EncoderTokenizer
from enc.encoder.errors import UsageError
from enc.encoder.models.vocabulary import padded_vocab_size
from enc.encoder.printable import jsonable, printable
from enc.encoder.sizing.sizes import feed_forward_width, num_parameters
from enc.tools.bench.clocks import spread
from enc.tools.bench.machine import device_of, installed_version, machine, machine_lines, refuse_unknown, write_page
from enc.tools.bench.step_profile import PROFILE_ADVICE, profile_step, profile_table
from enc.tools.bench.step_sides import PARTS, Block, Side, enc_side, full_rows, modernbert, natural_rows, trainer_side
from enc.tools.output import refuse_taken

PACKAGES = ("torch", "transformers", "accelerate", "enc-toolkit")
NAMES = {
    "enc": "enc, packed rows",
    "natural": "Trainer, natural",
    "grouped": "Trainer, grouped",
    "full": "Trainer, full rows",
    "natural-compiled": "compiled, natural",
    "full-compiled": "compiled, full",
}
RIVALS = [name for name in NAMES if name != "enc"]
_ADVICE = (
    "Useful (non-padding) tokens a second, medians of the rounds; what each side does is in the head of "
    "`tools/bench/step.py`."
)


@dataclass(frozen=True)
class Asked:
    """What to measure: the options of the command."""

    device: torch.device
    config: str  # recipe or YAML file
    overrides: dict[str, Any]
    dtypes: Sequence[str]
    against: Sequence[str]
    steps: int
    vocab_size: int
    median_tokens: int | None  # of a document of the default store; None: as they come
    sparse_prediction: bool = False
    threads: int | None = None
    clock: str = "wall"
    min_rounds: int = 3
    minutes: float = 4.0
    store: Path | None = None
    profile: bool = False
    to: Path | None = None
    as_json: bool = False


_SMALL = {
    "model.hidden_size": 384, "model.num_hidden_layers": 6, "model.num_attention_heads": 6,
    "model.intermediate_size": 1536, "dataset.max_seq_length": 512, "dataset.num_workers": 0,
    "trainer.per_device_train_batch_size": 8,
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {
        "config": "quickstart", "overrides": _SMALL, "dtypes": ["bf16", "fp32"],
        "against": ["natural", "grouped", "full"], "steps": 2, "vocab_size": 8192, "median_tokens": None,
    },
    "cuda": {
        "config": "neobert-250m", "overrides": {}, "dtypes": ["bf16"], "against": ["natural", "full"], "steps": 10,
        "vocab_size": 30522, "median_tokens": 400,
    },
}  # fmt: skip
_CHARACTERS_A_TOKEN = 4


def ask(device: str | None, overrides: dict[str, Any], **given: Any) -> Asked:
    """Return what to measure: what was given, and the default of the device where that is None.

    Raises UsageError for a side, dtype, clock, device, config, store or file that will not do.
    """
    target = device_of(device)
    defaults = DEFAULTS[target.type]
    if given.get("config") is None:  # the default keys belong to the default config
        overrides = defaults["overrides"] | overrides
    chosen = defaults | {name: value for name, value in given.items() if value is not None}
    asked = Asked(target, **chosen | {"overrides": overrides})
    refuse_unknown("--against", asked.against, RIVALS)
    refuse_unknown("--dtype", asked.dtypes, ["bf16", "fp32"])
    refuse_unknown("--clock", [asked.clock], ["wall", "cpu"])
    if asked.against and not asked.profile and installed_version("accelerate") is None:
        raise UsageError("Trainer needs the package accelerate: pip install accelerate, or --against '' for enc alone.")
    if asked.to is not None:
        refuse_taken(asked.to, folder=False)
    if asked.store is not None:
        TokenStore.open(asked.store)
    load_config(asked.config, asked.overrides)
    return asked


def bench(asked: Asked, say: Callable[[str], None]) -> str:
    """Measure what was asked for, write the page if one is wanted, and return the table or JSON."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    if asked.threads:
        torch.set_num_threads(asked.threads)
    prose = contextlib.redirect_stdout(sys.stderr)  # libraries print there
    with prose, tempfile.TemporaryDirectory(prefix="enc-bench-") as folder:
        report = compare(asked, Path(folder), say)
    text = profile_table(report) if asked.profile else table(report)
    if asked.to is not None:
        title, advice = (
            ("Where a training step goes", PROFILE_ADVICE) if asked.profile else ("The training step", _ADVICE)
        )
        write_page(asked.to, title, report["machine"], text, advice)
    return json.dumps(jsonable(report), indent=1) if asked.as_json else text


# --- what is trained -------------------------------------------------------------------------------------------------


def make_store(folder: Path, vocab_size: int, median_tokens: int | None) -> Path:
    """Make the token store of Python's documentation, as the `quickstart` recipe does but for the vocabulary.

    With `median_tokens` the texts are joined to documents of log-normal length (sigma 1, as web text roughly has).
    """
    settings: dict[str, Any] = {"dataset.pre_tokenize_output": str(folder), "tokenizer.train.vocab_size": vocab_size}
    if median_tokens is not None:
        documents = folder.parent / "documents.jsonl"
        documents.write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in joined(python_docs(), median_tokens))
        )
        settings["dataset.path"] = str(documents)
    config = load_config("quickstart", settings).config
    return preprocess(config.dataset, config.tokenizer, config.seed)


def joined(texts: Iterable[str], median_tokens: int) -> Iterator[str]:
    """Join texts to documents whose length is drawn from a log-normal distribution, the same ones each time."""
    rng, middle = random.Random(0), math.log(median_tokens * _CHARACTERS_A_TOKEN)
    parts: list[str] = []
    left = rng.lognormvariate(middle, 1.0)
    for text in texts:
        for start in range(0, len(text), 1000):  # the longest texts are books
            parts.append(text[start : start + 1000])
            left -= len(parts[-1])
            if left <= 0:
                yield "\n\n".join(parts)
                left, parts = rng.lognormvariate(middle, 1.0), []


def run_config(asked: Asked, dtype: str, store: Path, folder: Path) -> RunConfig:
    """Return the run config of enc's side, resolved as a plan would."""
    tokenizer = EncoderTokenizer.load(TokenStore.open(store).tokenizer_dir)
    settings = {
        "dataset.path": str(store),
        "datacollator.pack_sequences": True,
        "parallel.engine": "ddp",
        "trainer.output_dir": str(folder),
        "trainer.use_cpu": asked.device.type == "cpu",
        "trainer.mixed_precision": "bf16" if dtype == "bf16" else "no",
        "trainer.eval_strategy": "no",
        "trainer.save_strategy": "no",
        "trainer.max_steps": 1_000_000,
        "trainer.logging_steps": 1,
        "trainer.disable_tqdm": True,
        "wandb.enabled": False,
    }
    config = load_config(asked.config, asked.overrides | settings).config
    resolved = {
        "model.vocab_size": padded_vocab_size(tokenizer.num_tokens),
        "model.pad_token_id": tokenizer.pad_id,
        "trainer.global_batch_size": config.trainer.per_device_train_batch_size,
        "trainer.gradient_accumulation_steps": 1,
    }
    return config.changed(resolved)


# --- the comparison --------------------------------------------------------------------------------------------------


def compare(asked: Asked, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure every dtype asked for and return the report."""
    store = asked.store or make_store(folder / "store", asked.vocab_size, asked.median_tokens)
    configs = {dtype: run_config(asked, dtype, store, folder / dtype) for dtype in asked.dtypes}
    results: dict[str, Any] = {}
    for dtype, config in configs.items():
        say(f"{dtype}:")
        (folder / dtype).mkdir()
        results[dtype] = (_profiled if asked.profile else _measured)(asked, config, folder / dtype, say)
        gc.collect()  # the sides hold each other; the next dtype needs their memory
    return {
        "machine": machine(asked.device, PACKAGES), **_setting(asked, config),
        "rounds": 0 if asked.profile else min(_rounds(sides) for sides in results.values()), "results": results,
    }  # fmt: skip


def _profiled(asked: Asked, config: RunConfig, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    side, _ = enc_side(config, folder)
    return profile_step(side, asked.steps, not config.trainer.use_cpu)


def _measured(asked: Asked, config: RunConfig, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    tokenizer = EncoderTokenizer.load(TokenStore.open(config.dataset.store).tokenizer_dir)
    ours, peak_flops = enc_side(config, folder)
    sides = {"enc": ours}
    rows = {"natural": natural_rows(config, tokenizer), "full": full_rows(config, tokenizer)}
    for name in asked.against:
        side_rows = rows["full" if name.startswith("full") else "natural"]
        sides[name] = trainer_side(config, tokenizer, side_rows, folder, name, asked.sparse_prediction)
    seconds = 60 * asked.minutes / len(asked.dtypes)
    blocks, why_not = measure(sides, asked.steps, seconds, asked.min_rounds, asked.clock, say)
    return summary(blocks, asked.clock, peak_flops) | {name: {"why_not": reason} for name, reason in why_not.items()}


def measure(
    sides: dict[str, Side], steps: int, seconds: float, min_rounds: int, clock: str, say: Callable[[str], None]
) -> tuple[dict[str, list[Block]], dict[str, str]]:
    """Run the sides in turn until the time is up, at least so many rounds, after one that is not counted.

    A side that fails is left out from there on; the second value says why.
    """
    blocks: dict[str, list[Block]] = {name: [] for name in sides}
    why_not: dict[str, str] = {}

    def run(name: str, round_: int, counted: int) -> None:
        try:
            blocks[name].append(sides[name](round_, counted))
        except Exception as failure:  # out of memory, a compiler that is missing
            why_not[name] = f"{type(failure).__name__}: {printable((str(failure).splitlines() or [''])[0], 200)}"
            del blocks[name]
            say(f"{NAMES[name]}: {why_not[name]}")

    for name in sides:
        run(name, 0, 0)
    for runs in blocks.values():
        runs.clear()
    start = time.perf_counter()
    done = 0
    while blocks and (done < min_rounds or (time.perf_counter() - start) * (done + 1) / done < seconds):
        done += 1
        for name in list(blocks) if done % 2 else list(reversed(blocks)):
            run(name, done, steps)
        rates = ", ".join(f"{name} {runs[-1].rate(clock):,.0f}" for name, runs in blocks.items())
        say(f"round {done}: {rates} tokens/s")
    return blocks, why_not


def summary(blocks: dict[str, list[Block]], clock: str, peak_flops: float) -> dict[str, Any]:
    """Return medians and spreads of rates, and of enc's rate over each other's, round by round."""
    threads, result = torch.get_num_threads(), {}
    for name, runs in blocks.items():
        result[name] = {
            "tokens_per_s": spread([run.rate(clock) for run in runs]),
            "mfu": spread([run.flops / (run.clocked(clock) * peak_flops) for run in runs]),
            "fill": sum(run.tokens for run in runs) / sum(run.places for run in runs),
            "cpu_share": sum(run.cpu_seconds for run in runs) / sum(run.seconds for run in runs) / threads,
            "tokens_per_step": sum(run.tokens for run in runs) / sum(run.steps for run in runs),
            "peak_bytes": max((run.peak_bytes for run in runs if run.peak_bytes is not None), default=None),
            "parts_s": {part: spread([run.parts[part] for run in runs])["median"] for part in runs[0].parts},
            "blocks": [asdict(run) for run in runs],
        }
        if name != "enc" and "enc" in blocks:
            pairs = zip(blocks["enc"], runs, strict=True)
            result[name]["enc_is_times"] = spread([ours.rate(clock) / theirs.rate(clock) for ours, theirs in pairs])
    return result


def _rounds(sides: dict[str, Any]) -> int:
    return min((len(side["blocks"]) for side in sides.values() if "blocks" in side), default=0)


def _setting(asked: Asked, config: RunConfig) -> dict[str, Any]:
    """Return what was trained, for the report."""
    tokenizer = EncoderTokenizer.load(TokenStore.open(config.dataset.store).tokenizer_dir)
    model = {
        "layers": config.model.num_hidden_layers,
        "width": config.model.hidden_size,
        "heads": config.model.num_attention_heads,
        "feed_forward": feed_forward_width(config.model),
        "vocabulary": config.model.vocab_size,
        "enc_parameters": num_parameters(config),
        "hf_parameters": modernbert(config, tokenizer, asked.sparse_prediction).num_parameters(),
    }
    return {
        "model": model,
        "rows": config.trainer.per_device_train_batch_size,
        "row_length": config.row_length,
        "masked": config.datacollator.mlm_probability,
        "workers": num_workers(config, not config.trainer.use_cpu),
        "clock": asked.clock,
        "sparse_prediction": asked.sparse_prediction,
    }


# --- the table -------------------------------------------------------------------------------------------------------


def table(report: dict[str, Any]) -> str:
    """Return the report as text of at most 80 columns."""
    lines = [*machine_lines(report["machine"]), *setting_lines(report)]
    lines += ["", f"{'dtype':5} {'side':18} {'mfu':>6} {'peak GB':>8}" + "".join(f"{part:>10}" for part in PARTS)]
    for dtype, sides in report["results"].items():
        lines += [_work_line(dtype, NAMES[name], side) for name, side in sides.items() if "mfu" in side]
    lines += ["", f"{'dtype':5} {'side':18} {'tokens/s':>8} {'(range)':>13} {'fill':>5} {'cpu':>5}  enc is"]
    for dtype, sides in report["results"].items():
        for name, side in sides.items():
            lines += [_rate_line(dtype, NAMES[name], side)] if "mfu" in side else _reason_lines(dtype, name, side)
    return "\n".join(lines)


def setting_lines(report: dict[str, Any]) -> list[str]:
    """Return model and batch as lines of at most 80 characters."""
    model = report["model"]
    lines = [
        f"{model['layers']} x {model['width']}, {model['heads']} heads, feed-forward {model['feed_forward']}, "
        f"vocabulary {model['vocabulary']}, masked {report['masked']:g}",
        f"parameters: enc {model['enc_parameters'] / 1e6:.2f} M, ModernBERT {model['hf_parameters'] / 1e6:.2f} M"
        + (", sparse_prediction" if report["sparse_prediction"] else ""),
        f"microbatches of {report['rows']} rows of {report['row_length']}, {report['workers']} batch workers, "
        f"{report['rounds']} rounds, {report['clock']} time",
    ]
    return [line for text in lines for line in textwrap.wrap(text, 80)]


def _work_line(dtype: str, name: str, side: dict[str, Any]) -> str:
    peak = "" if side["peak_bytes"] is None else f"{side['peak_bytes'] / 1e9:.1f}"
    whole = sum(side["parts_s"].values())
    parts = "".join(f"{seconds / whole:>10.1%}" for seconds in side["parts_s"].values())
    return f"{dtype:5} {name:18} {side['mfu']['median']:6.1%} {peak:>8}{parts}".rstrip()


def _rate_line(dtype: str, name: str, side: dict[str, Any]) -> str:
    rate, ratio = side["tokens_per_s"], side.get("enc_is_times")
    line = f"{dtype:5} {name:18} {rate['median']:8,.0f} {rate['min']:6,.0f}-{rate['max']:<6,.0f} "
    line += f"{side['fill']:5.0%} {side['cpu_share']:5.0%}"
    return line + (f"  {ratio['median']:.2f} x ({ratio['min']:.2f}-{ratio['max']:.2f})" if ratio else "")


def _reason_lines(dtype: str, name: str, side: dict[str, Any]) -> list[str]:
    return textwrap.wrap(f"{dtype:5} {NAMES[name]:18} not run: {side['why_not']}", 80, subsequent_indent=" " * 25)


def main() -> None:
    """Parse the command line, measure, print the table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--width", type=int, help="hidden size")
    parser.add_argument("--heads", type=int)
    parser.add_argument("--intermediate-size", type=int, help="before the 2/3 rule; 4 x width by default")
    parser.add_argument("--rows", type=int, help="rows of a microbatch; enc's step is one microbatch")
    parser.add_argument("--row-length", type=int)
    parser.add_argument("--masked", type=float, help="share of masked tokens")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", nargs="+", choices=["bf16", "fp32"])
    parser.add_argument("--sides", nargs="*", choices=RIVALS)
    parser.add_argument("--sparse-prediction", action="store_true", help="ModernBERT computes labelled logits only")
    parser.add_argument("--threads", type=int, help="of PyTorch; its own choice by default")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: processor time, for --threads 1")
    parser.add_argument("--workers", type=int, help="batch workers of every side")
    parser.add_argument("--steps", type=int, help="counted optimizer steps of a side in a round")
    parser.add_argument("--min-rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=4, help="time of all rounds, split over the dtypes")
    parser.add_argument("--store", type=Path, help="token store; by default one of Python's documentation is made")
    parser.add_argument("--vocab-size", type=int, help="of the tokenizer trained for the default store")
    parser.add_argument("--profile", action="store_true", help="where the time of enc's step goes")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    asked = ask(
        args.device, _overrides(args), dtypes=args.dtype, against=args.sides, sparse_prediction=args.sparse_prediction,
        threads=args.threads, clock=args.clock, steps=args.steps, min_rounds=args.min_rounds, minutes=args.minutes,
        store=args.store, vocab_size=args.vocab_size, profile=args.profile, as_json=args.json,
    )  # fmt: skip
    print(bench(asked, lambda text: print(text, file=sys.stderr, flush=True)))


def _overrides(args: argparse.Namespace) -> dict[str, Any]:
    """Return the config keys that the short options stand for."""
    given = {
        "model.hidden_size": args.width,
        "model.num_hidden_layers": args.layers,
        "model.num_attention_heads": args.heads,
        "model.intermediate_size": args.intermediate_size or (args.width and 4 * args.width),
        "model.max_position_embeddings": args.row_length,
        "dataset.max_seq_length": args.row_length,
        "dataset.num_workers": args.workers,
        "datacollator.mlm_probability": args.masked,
        "trainer.per_device_train_batch_size": args.rows,
    }
    return {key: value for key, value in given.items() if value is not None}


if __name__ == "__main__":
    main()
