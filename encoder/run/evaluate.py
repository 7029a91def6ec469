"""Evaluate the model of a finished checkpoint, outside of a run."""

import itertools
from pathlib import Path

from enc.encoder.checkpoints.io import read_weights
from enc.encoder.config.load import load_text
from enc.encoder.data.tokenizer import EncoderTokenizer
from enc.encoder.errors import UsageError
from enc.encoder.hardware import Hardware
from enc.encoder.progress import shown
from enc.encoder.ranks import Ranks
from enc.encoder.run.task import make_task, module_of


def evaluate_checkpoint(folder: Path, store: str | None, split: str, max_batches: int | None) -> dict[str, float]:
    """Return the metrics of a checkpoint on a split of its own token store, or of another one.

    Masks, arithmetic and batches are those of the run's own evaluation, and of its test for the split `test`, so on its
    own store the numbers are the same.
    Raises UsageError when the store has no such split or was made with another tokenizer.
    """
    config = load_text((folder / "config.yaml").read_text(), str(folder / "config.yaml")).config
    if store is not None:
        config = config.changed({"dataset.path": store})
    trainer = config.trainer
    hardware = Hardware.detect(trainer.use_cpu, 0, trainer.bf16, trainer.tf32)
    ranks = Ranks(rank=0, world_size=1, local_rank=0)
    task = make_task(config.changed({"trainer.eval_strategy": "no"}), ranks, hardware)
    found, own = (EncoderTokenizer.load(path) for path in (task.data.tokenizer_dir, folder / "tokenizer"))
    if found.fingerprint() != own.fingerprint():
        raise UsageError(
            f"The token store {config.dataset.path} was made with another tokenizer than the checkpoint {folder}. "
            f"Preprocess the text with the checkpoint's own: --tokenizer.path {folder / 'tokenizer'}."
        )
    count = max_batches or (None if split == "test" else trainer.eval_max_batches)
    evaluation = task.evaluation(split, count)
    task.model.load_state_dict(read_weights(folder))
    with shown("Evaluating") as show:
        rounds = itertools.count()

        def never() -> bool:
            show(next(rounds), evaluation.num_batches)
            return False

        return evaluation(module_of(task).to(hardware.device), ranks, hardware, never) or {}
