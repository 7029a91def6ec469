"""Measure `enc preprocess` against `datasets.map`: text files in, token ids on disk, tokens per second.

    python -m enc.tools.bench.preprocess --source '/usr/share/doc/linux-doc-6.1/**/*.rst.gz'

Both sides run as fresh processes, one after the other, several times in turn; the median counts. Each starts from the
files and ends with a folder that `datasets.load_from_disk` opens. The `datasets` side is lean: fast tokenizer,
batched, `input_ids` alone, no special tokens, no attention mask, ids typed uint16. Ours includes starting the workers,
checksums and fsync. Python's start and the imports are left out of `seconds` on both sides and shown as `wall`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from enc.encoder.data.config import DatasetConfig, TokenizerConfig, TokenizerTrainConfig
from enc.encoder.data.obtain import obtain_tokenizer
from enc.encoder.data.preprocess import preprocess
from enc.encoder.data.sources.documents import read_documents
from enc.encoder.data.sources.find import resolve_source
from enc.encoder.data.sources.python_docs import python_docs
from enc.encoder.data.store import TokenStore
from enc.encoder.data.tokenizer import EncoderTokenizer


def dataset_config(source: str, output: str, num_proc: int) -> DatasetConfig:
    """Return the dataset section of both sides: every file is a document."""
    return DatasetConfig(path=source, text_unit="file", pre_tokenize_output=output, num_proc=num_proc)


def run_ours(source: str, tokenizer: str, output: str, num_proc: int) -> dict[str, float]:
    """Preprocess once; return seconds and tokens."""
    start = time.perf_counter()
    path = preprocess(dataset_config(source, output, num_proc), TokenizerConfig(path=tokenizer), seed=0)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "tokens": TokenStore.open(path).manifest["splits"]["train"]["tokens"]}


def run_datasets(source: str, tokenizer: str, output: str, num_proc: int) -> dict[str, float]:
    """Do the same with `datasets`: read, map in batches, save; return seconds and tokens."""
    import datasets

    datasets.disable_progress_bars()
    fast = EncoderTokenizer.load(tokenizer).tokenizer
    config = dataset_config(source, output, num_proc)

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        return {"input_ids": [e.ids for e in fast.encode_batch_fast(batch["text"], add_special_tokens=False)]}

    start = time.perf_counter()
    found = resolve_source(config)
    texts = [document.text for document in read_documents(found, config, 0)]
    rows = datasets.Dataset.from_dict({"text": texts})
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("uint16"))})
    mapped = rows.map(
        encode, batched=True, batch_size=200, num_proc=num_proc, remove_columns=["text"], features=features
    )
    mapped.save_to_disk(output)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "tokens": sum(map(len, mapped.with_format("numpy")["input_ids"]))}


SIDES = {"enc": run_ours, "datasets": run_datasets}


def measure(side: str, source: str, tokenizer: str, num_proc: int) -> dict[str, float]:
    """Run one side in a fresh process that writes to a fresh folder."""
    with tempfile.TemporaryDirectory(prefix="enc-bench-") as folder:
        command = [sys.executable, "-m", "enc.tools.bench.preprocess", "--side", side, "--source", source]
        command += ["--tokenizer", tokenizer, "--num-proc", str(num_proc), "--output", f"{folder}/out"]
        start = time.perf_counter()
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
        measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return measured | {"wall": time.perf_counter() - start}


def compare(source: str, tokenizer: str, num_proc: int, repeats: int) -> None:
    """Run both sides in turn and print a line for each, with the medians, and the ratio."""
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(repeats):
        for side in SIDES:
            runs[side].append(measure(side, source, tokenizer, num_proc))
    rates = {}
    for side, results in runs.items():
        median = {key: statistics.median(run[key] for run in results) for key in ("seconds", "wall", "tokens")}
        rates[side] = median["tokens"] / median["seconds"]
        spread = ", ".join(f"{run['seconds']:.2f}" for run in results)
        print(
            f"{side:9} {rates[side]:12,.0f} tokens/s  {median['tokens']:,.0f} tokens in {median['seconds']:.2f} s "
            f"({spread}), wall {median['wall']:.2f} s"
        )
    print(f"ratio     {rates['enc'] / rates['datasets']:.2f}  (num_proc {num_proc}, median of {repeats})")


def train_for(source: str, model: str, vocab_size: int, folder: str) -> None:
    """Train the tokenizer of the comparison on the source itself."""
    config = dataset_config(source, "", 1)
    found = resolve_source(config)
    section = TokenizerConfig(train=TokenizerTrainConfig.model_validate({"model": model, "vocab_size": vocab_size}))

    obtain_tokenizer(section, lambda: (str(text.text) for text in read_documents(found, config, 0))).save(folder)


def python_docs_file(path: Path, copies: int = 10) -> str:
    """Write the built-in source ten times over, about 30 MB, so that start-up does not decide; return the path."""
    documents = [json.dumps({"text": text}) + "\n" for text in python_docs()]
    path.write_text("".join(documents * copies))
    return str(path)


def main() -> None:
    """Parse the command line; with --side, run that side alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="", help="file, folder or glob of text; by default Python's documentation")
    parser.add_argument("--tokenizer", default="", help="tokenizer folder; by default one is trained on the source")
    parser.add_argument("--model", default="wordpiece", choices=["wordpiece", "bpe"], help="what to train")
    parser.add_argument("--vocab-size", type=int, default=30522)
    parser.add_argument("--num-proc", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--output", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(SIDES[args.side](args.source, args.tokenizer, args.output, args.num_proc)))
        return
    with tempfile.TemporaryDirectory(prefix="enc-bench-") as folder:
        tokenizer = args.tokenizer or str(Path(folder, "tokenizer"))
        source = args.source or python_docs_file(Path(folder, "python-docs.jsonl"))
        if not args.tokenizer:
            train_for(source, args.model, args.vocab_size, tokenizer)
        compare(source, tokenizer, args.num_proc, args.repeats)


if __name__ == "__main__":
    main()
