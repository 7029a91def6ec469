"""Measure what a checkpoint costs training: the time that it waits, and how much slower steps are meanwhile.

    python -m enc.tools.bench.save                                       # neobert-100m, one process
    python -m enc.tools.bench.save --engine deepspeed --nproc 2 --json

A real `enc launch` of `neobert-100m` (its size, rows of 1024 tokens; a small batch, so that steps are short and the
figures are the worst case) on Python's documentation, with a checkpoint every four steps. "Waited" is the time from the
end of a step until training goes on; files are written while it does. Steps that ran beside a write are compared with
those before the first one. The last line is the whole cost of a checkpoint as a share of 100 steps.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from enc.encoder.config.load import load_config
from enc.encoder.config.overrides import parse_overrides
from enc.encoder.events import EVENTS_FILE, Event
from enc.encoder.models.vocabulary import padded_vocab_size
from enc.encoder.sizing.sizes import checkpoint_bytes, num_parameters

_SAVE_STEPS = 4
_ENC = [sys.executable, "-c", "from enc.launcher.cli.app import main; main()"]


def measure(overrides: list[str], folder: Path) -> dict[str, Any]:
    """Run the launch in `folder` and return its figures, in seconds."""
    words = ["launch", "pretrain", "neobert-100m", *overrides]
    subprocess.run([*_ENC, *words], cwd=folder, check=True, stdout=sys.stderr)
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    events = [json.loads(line) for line in (folder / "run" / EVENTS_FILE).read_text().splitlines()]
    saves = [event for event in events if event["event"] == Event.SAVED]
    steps = {record["step"]: record for record in records if "loss" in record}
    quiet = [steps[step]["step_s"] for step in range(2, _SAVE_STEPS + 1)]
    step_s, waited = statistics.median(quiet), statistics.median(save["stall_seconds"] for save in saves)
    slower = statistics.median(_slower(save, steps, step_s) for save in saves[:-1])
    return {
        "step_s": step_s,
        "waited_s": waited,
        "written_s": statistics.median(save["seconds"] for save in saves),
        "slower_s": slower,
        "share_waited": waited / (100 * step_s),
        "share": (waited + slower) / (100 * step_s),
    }


def _slower(save: dict[str, Any], steps: dict[int, dict[str, Any]], step_s: float) -> float:
    """Return how many seconds longer than usual the steps took that began while a checkpoint was written."""
    began = steps[save["step"]]["time"]
    after = (steps[save["step"] + n] for n in range(1, _SAVE_STEPS + 1))
    slower: float = sum(s["step_s"] - step_s for s in after if s["time"] - s["step_s"] < began + save["seconds"])
    return max(0.0, slower)


def _overrides(arguments: argparse.Namespace) -> list[str]:
    return [
        "dataset.name=python-docs", "dataset.eval_samples=null", "tokenizer={train: {vocab_size: 30522}}",
        f"launch.nproc_per_node={arguments.nproc}", f"parallel.engine={arguments.engine}",
        f"parallel.zero_stage={arguments.zero_stage}", f"trainer.per_device_train_batch_size={arguments.rows}",
        "trainer.gradient_accumulation_steps=1", f"trainer.max_steps={4 * _SAVE_STEPS}",
        f"trainer.save_steps={_SAVE_STEPS}", "trainer.save_total_limit=1", "trainer.logging_steps=1",
        "trainer.eval_strategy=no", "trainer.disable_tqdm=true", "trainer.output_dir=run",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="ddp", choices=("ddp", "fsdp", "deepspeed"))
    parser.add_argument("--zero-stage", type=int, default=2)
    parser.add_argument("--nproc", type=int, default=1)
    parser.add_argument("--rows", type=int, default=2, help="rows of a microbatch, one microbatch a step")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key of the config")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    overrides = [*_overrides(arguments), *arguments.set]
    config = load_config("neobert-100m", parse_overrides(overrides)).config
    config = config.changed({"model.vocab_size": padded_vocab_size(30522)})
    with tempfile.TemporaryDirectory(prefix="enc-bench-save-") as folder:
        figures = measure(overrides, Path(folder))
    if arguments.json:
        print(json.dumps(figures))
        return
    stage = f" ZeRO-{arguments.zero_stage}" if arguments.engine == "deepspeed" else ""
    print(f"{platform.processor() or platform.machine()}, {arguments.engine}{stage}, {arguments.nproc} process(es)")
    print(f"{num_parameters(config) / 1e6:.1f} M parameters, checkpoint {checkpoint_bytes(config) / 1e9:.2f} GB")
    print(f"a step of {arguments.rows * arguments.nproc} rows takes {figures['step_s']:.2f} s; a checkpoint every 100:")
    print(f"  training waits            {figures['waited_s']:6.2f} s  {figures['share_waited']:7.2%}")
    print(f"  steps beside the write   +{figures['slower_s']:6.2f} s")
    print(f"  both                      {figures['waited_s'] + figures['slower_s']:6.2f} s  {figures['share']:7.2%}")
    print(f"  on disk after             {figures['written_s']:6.2f} s")


if __name__ == "__main__":
    main()
