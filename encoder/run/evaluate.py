"""Evaluate the model of a finished checkpoint, outside of a run."""

from pathlib import Path

from enc.encoder.checkpoints.io import read_weights
from enc.encoder.config.load import load_text
from enc.encoder.data.batches import EvalBatches
from enc.encoder.errors import UsageError
from enc.encoder.evaluate.mlm import evaluate_mlm
from enc.encoder.hardware import Hardware
from enc.encoder.ranks import Ranks
from enc.encoder.run import build


def evaluate_checkpoint(folder: Path, store: str | None, split: str, max_batches: int | None) -> dict[str, float]:
    """Return the MLM metrics of a checkpoint on a split of its own token store, or of another one.

    Masks, arithmetic and batches are those of the run's own evaluation, and of its test for the split `test`, so on its
    own store the numbers are the same.
    Raises UsageError when the store has no such split or was made with another tokenizer.
    """
    config = load_text((folder / "config.yaml").read_text(), str(folder / "config.yaml")).config
    if store is not None:
        config = config.changed({"dataset.path": store})
    data = build.open_data(config.changed({"trainer.eval_strategy": "no"}))
    if data.tokenizer.fingerprint() != build.EncoderTokenizer.load(folder / "tokenizer").fingerprint():
        raise UsageError(
            f"The token store {config.dataset.path} was made with another tokenizer than the checkpoint {folder}. "
            "Preprocess the text with the checkpoint's own: --tokenizer.path "
            f"{folder / 'tokenizer'}."
        )
    rows = build.packed_rows(data.store, split, data.tokenizer, config)
    trainer = config.trainer
    hardware = Hardware.detect(trainer.use_cpu, 0, trainer.mixed_precision == "bf16", trainer.tf32)
    model, objective = build.build_model(config, data.tokenizer.num_tokens)
    model.load_state_dict(read_weights(folder))
    objective.to(hardware.device)
    purpose = "test" if split == "test" else "eval"
    batches = EvalBatches(rows, data.masker, config.seed, trainer.per_device_eval_batch_size, purpose)
    count = max_batches or (trainer.eval_max_batches if purpose == "eval" else None)
    ranks = Ranks(rank=0, world_size=1, local_rank=0)
    return evaluate_mlm(objective, batches, ranks, hardware, count, prefix=purpose) or {}
