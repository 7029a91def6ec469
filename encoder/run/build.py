"""From a run's config to the parts that its loop uses: data, model, engine."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from enc.encoder.config.schema import RunConfig
from enc.encoder.data.batches import EvalBatches, Rows, TrainBatches
from enc.encoder.data.masking import Masker
from enc.encoder.data.packing import plan_rows
from enc.encoder.data.store import TokenStore, data_fingerprint
from enc.encoder.data.tokenizer import EncoderTokenizer
from enc.encoder.engine.ddp import DdpEngine
from enc.encoder.engine.interface import Engine
from enc.encoder.engine.settings import read_settings
from enc.encoder.errors import UsageError
from enc.encoder.models import build as models
from enc.encoder.models.vocabulary import padded_vocab_size
from enc.encoder.objectives.mlm import MlmObjective
from enc.encoder.ranks import Ranks
from enc.encoder.signals import die_with_parent, shield_worker
from enc.encoder.sizing.batch_split import BatchSplit

_MAX_WORKERS = 16


@dataclass(frozen=True)
class Data:
    """The token store of a run as packed, masked batches."""

    store: TokenStore
    tokenizer: EncoderTokenizer
    train: Rows
    eval: Rows | None
    test: Rows | None
    masker: Masker

    @property
    def fingerprint(self) -> str:
        """A hash of the store's tokens and tokenizer."""
        return data_fingerprint(self.store.manifest)

    @property
    def tokenizer_files(self) -> list[Path]:
        """What a checkpoint keeps of the tokenizer."""
        return [self.store.tokenizer_dir, self.store.path / "tokenizer_info.json"]


def open_data(config: RunConfig) -> Data:
    """Open the token store of a run config and plan its rows. Raises UsageError when they do not fit together."""
    store = TokenStore.open(Path(config.dataset.path))
    tokenizer = EncoderTokenizer.load(store.tokenizer_dir)
    if padded_vocab_size(tokenizer.num_tokens) != config.model.vocab_size:
        raise UsageError(
            f"The token store {store.path} was made with a tokenizer of {tokenizer.num_tokens} tokens, the model of "
            f"this run has {config.model.vocab_size} embedding rows. Use the store that the run was started with."
        )
    masker = Masker.of(tokenizer, config)
    evaluates = config.trainer.eval_strategy != "no" and "eval" in store.splits
    wanted = {"train": True, "eval": evaluates, "test": "test" in store.splits}
    rows = {split: packed_rows(store, split, tokenizer, config) if there else None for split, there in wanted.items()}
    for split, found in rows.items():
        if found is not None and not any(masker.can_mask(found.row(index)[0]) for index in range(len(found))):
            raise UsageError(f"The {split} split of the token store {store.path} has no token that can be predicted.")
    assert rows["train"] is not None
    return Data(store, tokenizer, rows["train"], rows["eval"], rows["test"], masker)


def packed_rows(store: TokenStore, split: str, tokenizer: EncoderTokenizer, config: RunConfig) -> Rows:
    """Plan the rows of a split as the config asks. Raises UsageError when it holds no documents."""
    documents = store.split(split)
    special = (tokenizer.cls_id is not None) + (tokenizer.sep_id is not None)
    plan = plan_rows(documents.lengths, config.row_length, special, config.seed, config.datacollator.pack_sequences)
    if not plan.num_rows:
        raise UsageError(f"The {split} split of the token store {store.path} holds no documents.")
    return Rows(documents, plan, tokenizer.cls_id, tokenizer.sep_id)


def eval_batches(data: Data, config: RunConfig, split: str = "eval") -> EvalBatches | None:
    """Return the batches of the split `eval` or `test` of a run, or None when it has none."""
    rows = data.test if split == "test" else data.eval
    if rows is None:
        return None
    return EvalBatches(rows, data.masker, config.seed, config.trainer.per_device_eval_batch_size, split)


def train_loader(
    data: Data, config: RunConfig, split: BatchSplit, ranks: Ranks, cuda: bool, first_step: int
) -> DataLoader:
    """Return this rank's microbatches from `first_step` (counted from 0) to the end of the run, in order."""
    batches: Dataset = TrainBatches(data.train, data.masker, config.seed, split, ranks.rank)
    workers = num_workers(config, cuda)
    indices = range(first_step * split.accumulation, config.trainer.max_steps * split.accumulation)
    return DataLoader(
        batches,
        batch_size=None,
        sampler=indices,
        num_workers=workers,
        prefetch_factor=(config.dataset.prefetch_factor or 4) if workers else None,
        pin_memory=cuda,
        worker_init_fn=_init_worker,
        multiprocessing_context="fork" if workers else None,  # workers share the opened store and the packing plan
    )


def num_workers(config: RunConfig, cuda: bool) -> int:
    """Return the number of batch workers of one rank."""
    if config.dataset.num_workers is not None:
        return config.dataset.num_workers
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(_MAX_WORKERS, cores)) if cuda else 1


def _init_worker(worker_id: int) -> None:
    die_with_parent()
    shield_worker(worker_id)


def build_model(config: RunConfig, num_tokens: int) -> tuple[Any, MlmObjective]:
    """Return the model with its first weights, a `MaskedLanguageModel`, and its training objective."""
    model: Any = models.build_model(config.model, num_tokens)
    models.init_weights(model, config.model, config.seed)
    trainer, parallel = config.trainer, config.parallel
    if trainer.gradient_checkpointing:
        model.recompute(parallel.activation_checkpointing, parallel.activation_checkpointing_every)
    objective = MlmObjective(
        model,
        num_tokens,
        full_logits=not trainer.masked_logits_only_loss,
        full_last_layer=not trainer.last_layer_of_labels_only,
        bf16=trainer.mixed_precision == "bf16",
        z_loss=trainer.z_loss_weight,
        label_smoothing=trainer.label_smoothing_factor,
    )
    return model, objective


def build_engine(
    run_dir: Path, config: RunConfig, model: Any, objective: MlmObjective, split: BatchSplit, device: torch.device
) -> Engine:
    """Compile the model if asked, put it on its device and wrap it in the engine of the config.

    What a sharding engine is told it reads from its file in the run folder. Raises UsageError when that is broken.
    """
    trainer, optimizer, engine = config.trainer, config.optimizer, config.parallel.engine
    if trainer.torch_compile:
        # Flat batches differ in length. Dynamic shapes from the first step on, for a run that compiled static ones
        # first and dynamic ones later would differ in its last bits from one that was resumed in between.
        dynamic = True if trainer.torch_compile_dynamic is None else trainer.torch_compile_dynamic
        for block in model.blocks:
            block.compile(backend=trainer.torch_compile_backend, dynamic=dynamic)
    if engine == "fsdp":
        from enc.encoder.engine.fsdp import FsdpEngine  # a second of imports that others need not wait for

        settings = read_settings(run_dir, config, split)
        return FsdpEngine(objective, model, model.blocks, optimizer, trainer.gradient_clipping, settings, device)
    if engine == "deepspeed":
        from enc.encoder.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(objective, model, optimizer, read_settings(run_dir, config, split), device)
    return DdpEngine(objective.to(device), model, optimizer, trainer.gradient_clipping, split.world_size)
