"""A token store as packed, masked batches: the `TrainData` of text that was preprocessed."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from enc.encoder.config.schema import RunConfig
from enc.encoder.data.batches import EvalBatches, Microbatch, Rows, TrainBatches
from enc.encoder.data.interface import Cursor, Share, ShouldStop, never
from enc.encoder.data.loader import awaited, make_loader
from enc.encoder.data.manifest import data_fingerprint
from enc.encoder.data.masking import Masker
from enc.encoder.data.packing import plan_rows
from enc.encoder.data.store import TokenStore
from enc.encoder.data.tokenizer import EncoderTokenizer
from enc.encoder.errors import UsageError
from enc.encoder.models.vocabulary import padded_vocab_size


@dataclass(frozen=True)
class StoreData:
    """The token store of a run, its splits packed into rows. Rows are random access, so there is no cursor."""

    config: RunConfig
    store: TokenStore
    tokenizer: EncoderTokenizer
    masker: Masker
    splits: dict[str, Rows]  # train, and of eval and test those that the run uses

    @classmethod
    def open(cls, config: RunConfig) -> "StoreData":
        """Open the token store of a run config and plan its rows.

        Raises UsageError when store and config do not fit together, or a split has no token that can be predicted.
        """
        store = TokenStore.open(config.dataset.store)
        tokenizer = EncoderTokenizer.load(store.tokenizer_dir)
        if padded_vocab_size(tokenizer.num_tokens) != config.model.vocab_size:
            raise UsageError(
                f"The token store {store.path} was made with a tokenizer of {tokenizer.num_tokens} tokens, the model "
                f"of this run has {config.model.vocab_size} embedding rows. Use the store that the run was started "
                "with."
            )
        masker = Masker.of(tokenizer, config)
        splits = {split: packed_rows(store, split, tokenizer, config) for split in _used_splits(store, config)}
        for split, rows in splits.items():
            if not any(masker.can_mask(rows.row(index)[0]) for index in range(len(rows))):
                raise UsageError(
                    f"The {split} split of the token store {store.path} has no token that can be predicted."
                )
        return cls(config, store, tokenizer, masker, splits)

    @property
    def fingerprint(self) -> str:
        return data_fingerprint(self.store.manifest)

    @property
    def tokenizer_dir(self) -> Path:
        return self.store.tokenizer_dir

    @property
    def attachments(self) -> list[Path]:
        return [self.tokenizer_dir, self.store.path / "tokenizer_info.json"]

    def steps(
        self, share: Share, first_step: int, cursor: Cursor | None = None, should_stop: ShouldStop = never
    ) -> Iterator[list[Microbatch]]:
        accumulation = share.split.accumulation
        indices = range(first_step * accumulation, self.config.trainer.max_steps * accumulation)
        loader = make_loader(self._train_batches(share), indices, self.config, share.pin_memory)
        microbatches = awaited(iter(loader), should_stop, self.config.launch.hang_timeout_s)
        steps = (list(islice(microbatches, accumulation)) for _ in range(len(indices) // accumulation))
        return (step if len(step) == accumulation else [] for step in steps)

    def first_batch(self, share: Share) -> Microbatch:
        return self._train_batches(share)[0]

    def _train_batches(self, share: Share) -> TrainBatches:
        return TrainBatches(self.splits["train"], self.masker, self.config.seed, share.split, share.rank)

    def cursor(self, step: int) -> None:
        return None

    def places_per_step(self, share: Share) -> int:
        return share.split.rows_per_step * self.config.row_length

    def describe(self, share: Share) -> str:
        rows = self.splits["train"]
        epochs = self.config.trainer.max_steps * share.split.rows_per_step / len(rows)
        return f"{len(rows)} rows of {rows.row_length} tokens, fill {rows.fill:.4f}, {epochs:.2f} epochs"

    def held_out_batches(self, split: str) -> EvalBatches:
        """Return the batches of a split in order. Masks are those of the test for `test`, else those of evaluations.

        Raises UsageError when the store has no such split.
        """
        rows = self.splits.get(split) or packed_rows(self.store, split, self.tokenizer, self.config)
        purpose = "test" if split == "test" else "eval"
        return EvalBatches(rows, self.masker, self.config.seed, self.config.trainer.per_device_eval_batch_size, purpose)


def _used_splits(store: TokenStore, config: RunConfig) -> list[str]:
    evaluates = config.trainer.eval_strategy != "no"
    wanted = {"train": True, "eval": evaluates and "eval" in store.splits, "test": "test" in store.splits}
    return [split for split, used in wanted.items() if used]


def packed_rows(store: TokenStore, split: str, tokenizer: EncoderTokenizer, config: RunConfig) -> Rows:
    """Plan the rows of a split as the config asks. Raises UsageError when it holds no documents."""
    documents = store.split(split)
    special = (tokenizer.cls_id is not None) + (tokenizer.sep_id is not None)
    plan = plan_rows(documents.lengths, config.row_length, special, config.seed, config.datacollator.pack_sequences)
    if not plan.num_rows:
        raise UsageError(f"The {split} split of the token store {store.path} holds no documents.")
    return Rows(documents, plan, tokenizer.cls_id, tokenizer.sep_id)
