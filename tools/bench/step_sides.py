"""The sides of `enc bench step`: enc's own loop, and Hugging Face's `Trainer` with a ModernBERT of the same size."""

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from enc.encoder.config.schema import RunConfig
from enc.encoder.data.loader import num_workers
from enc.encoder.data.store import TokenStore
from enc.encoder.data.store_data import StoreData
from enc.encoder.data.tokenizer import EncoderTokenizer
from enc.encoder.hardware import measured_peak
from enc.encoder.ranks import Ranks
from enc.encoder.run.log import RunLog
from enc.encoder.run.start import build, open_heartbeat
from enc.encoder.run.state import TrainState
from enc.encoder.run.train import train
from enc.encoder.signals import StopFlag
from enc.encoder.sizing.sizes import feed_forward_width, training_flops

PARTS = ("data_wait", "forward", "backward", "optimizer")


@dataclass(frozen=True)
class Block:
    """What a side did in one round, its warm-up left out."""

    tokens: int  # useful ones
    places: int  # padding included
    steps: int
    seconds: float
    cpu_seconds: float  # of this process, all threads
    flops: int  # of the useful tokens, attention over real lengths, output matrix for labels only
    peak_bytes: int | None = None  # allocated on the GPU, warm-up included
    parts: dict[str, float] = field(default_factory=dict)  # seconds a step

    def clocked(self, clock: str) -> float:
        """Return the seconds by the clock on the wall or of processor time."""
        return self.seconds if clock == "wall" else self.cpu_seconds

    def rate(self, clock: str) -> float:
        """Return useful tokens a second."""
        return self.tokens / self.clocked(clock)


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


def warm_up_steps(config: RunConfig) -> int:
    """Return the steps of a block that are not counted; a GPU's first ones choose algorithms and start workers."""
    return 1 if config.trainer.use_cpu else 3


class _Peak:
    """The most memory that a block held on the GPU, without what others hold there."""

    def __init__(self, config: RunConfig, others: int | None = None) -> None:
        self.cuda = not config.trainer.use_cpu
        if self.cuda:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.others = torch.cuda.memory_allocated() if others is None else others

    def read(self) -> int | None:
        return torch.cuda.max_memory_allocated() - self.others if self.cuda else None


# --- enc -------------------------------------------------------------------------------------------------------------


class _Enough(Exception):
    """Leaves the training loop after the last step of a block."""


class _ClockedLog(RunLog):
    """A run's log that keeps each step's record and the time instead of writing them, and stops the loop."""

    def watch(self, state: TrainState, steps: int) -> None:
        self.state, self.left = state, steps
        self.marks: list[Mark] = []
        self.records: list[dict[str, Any]] = []

    def train(self, record: dict[str, Any]) -> None:
        self.marks.append(Mark.now(self.state.tokens))
        self.records.append(record)
        if len(self.marks) == self.left:
            raise _Enough


def enc_side(config: RunConfig, folder: Path) -> tuple[Side, float]:
    """Return enc's side, the real loop on a real run, its log apart; and the peak rate that its MFU refers to."""
    others = 0 if config.trainer.use_cpu else torch.cuda.memory_allocated()
    run = build(folder, Ranks(0, 1, 0), config, StopFlag(), open_heartbeat(folder, 0, config))
    run.reporter.log = log = _ClockedLog(folder, config, 1, True, 0)
    peak_flops = run.place.hardware.peak_flops or measured_peak(run.place.hardware.device, config.trainer.bf16)
    run.place = replace(run.place, hardware=replace(run.place.hardware, peak_flops=peak_flops))
    warm_up = warm_up_steps(config)

    def block(_round: int, steps: int) -> Block:
        log.watch(run.state, warm_up + steps)
        peak = _Peak(config, others)
        try:
            train(run)
        except _Enough:
            start, end, counted = log.marks[warm_up - 1], log.marks[-1], log.records[warm_up:]
        places = steps * run.task.data.places_per_step(run.task.share)
        # The loop's own count: a record's MFU is its operations over its seconds and the peak rate.
        flops = round(sum(record["mfu"] * record["step_s"] for record in counted) * peak_flops)
        parts = {part: statistics.fmean(r[f"{part}_s"] for r in counted) for part in PARTS} if counted else {}
        wall, cpu = end.wall - start.wall, end.cpu - start.cpu
        return Block(end.done - start.done, places, steps, wall, cpu, flops, peak.read(), parts)

    return block, peak_flops


# --- Trainer ---------------------------------------------------------------------------------------------------------

Row = dict[str, list[int]]


def natural_rows(config: RunConfig, tokenizer: EncoderTokenizer) -> list[Row]:
    """Return the training documents as `run_mlm.py` makes them: [CLS] text [SEP], cut at the row length."""
    before = [tokenizer.cls_id] if tokenizer.cls_id is not None else []
    after = [tokenizer.sep_id] if tokenizer.sep_id is not None else []
    room = config.row_length - len(before) - len(after)
    documents = TokenStore.open(config.dataset.store).split("train")
    return [_row([*before, *documents[i][:room].tolist(), *after], tokenizer) for i in range(len(documents))]


def full_rows(config: RunConfig, tokenizer: EncoderTokenizer) -> list[Row]:
    """Return the text of enc's packed rows, one after the other, cut at every row length."""
    packed = StoreData.open(config).splits["train"]
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
    config: RunConfig, tokenizer: EncoderTokenizer, rows: list[Row], folder: Path, name: str, sparse: bool
) -> Side:
    """Return a Trainer on these rows; it accumulates microbatches to about the tokens of enc's step."""
    from transformers import (
        DataCollatorForLanguageModeling,
        PreTrainedTokenizerFast,
        PrinterCallback,
        TrainingArguments,
    )

    trainer, warm_up = config.trainer, warm_up_steps(config)
    fast = PreTrainedTokenizerFast.from_pretrained(TokenStore.open(config.dataset.store).tokenizer_dir)
    collator = DataCollatorForLanguageModeling(fast, mlm_probability=config.datacollator.mlm_probability)
    microbatch = trainer.per_device_train_batch_size
    tokens = config.row_length * microbatch
    mean = statistics.fmean(len(row["input_ids"]) for row in rows)

    def block(round_: int, steps: int) -> Block:
        arguments = TrainingArguments(
            output_dir=str(folder),
            use_cpu=trainer.use_cpu,
            bf16=trainer.bf16,
            torch_compile=name.endswith("-compiled"),
            max_steps=warm_up + steps,
            per_device_train_batch_size=microbatch,
            gradient_accumulation_steps=max(1, round(tokens / (mean * microbatch))),
            train_sampling_strategy="group_by_length" if name == "grouped" else "random",
            optim="adamw_torch_fused",
            learning_rate=config.optimizer.lr,
            weight_decay=config.optimizer.weight_decay,
            adam_beta1=config.optimizer.betas[0],
            adam_beta2=config.optimizer.betas[1],
            max_grad_norm=trainer.gradient_clipping or 0.0,
            dataloader_num_workers=num_workers(config, not trainer.use_cpu),
            dataloader_pin_memory=not trainer.use_cpu,
            remove_unused_columns=False,  # it would take away the special-token masks, which save the collator work
            seed=config.seed + round_,
            logging_strategy="no",
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        if not trainer.use_cpu:
            arguments._n_gpu = 1  # with more it would spread over all of them
        peak, clock = _Peak(config), _step_clock(warm_up)
        hf_trainer = _noting_trainer()(
            modernbert(config, tokenizer, sparse), arguments, data_collator=collator, train_dataset=rows,
            callbacks=[clock],
        )  # fmt: skip
        clock.count = hf_trainer.noted
        hf_trainer.remove_callback(PrinterCallback)
        with _any_algorithm():
            hf_trainer.train()
        start, end = clock.marks[warm_up - 1], clock.marks[-1]
        counted = hf_trainer.noted[start.done : end.done]
        lengths = np.concatenate([noted[0].cpu().numpy() for noted in counted]) if counted else np.zeros(0, int)
        labels, places = sum(int(noted[1]) for noted in counted), sum(noted[2] for noted in counted)
        total, squares = int(lengths.sum()), int((lengths**2).sum())
        flops = training_flops(config.model, total, total, squares, labels, whole_last_layer=True)
        wall, cpu = end.wall - start.wall, end.cpu - start.cpu
        return Block(int(lengths.sum()), places, steps, wall, cpu, flops, peak.read())

    return block


@contextmanager
def _any_algorithm() -> Iterator[None]:
    """Leave the choice of algorithms to torch, as outside of enc, and forget what a compiling Trainer asked for."""
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)
        for name in ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE"):  # the next Trainer would compile as well
            os.environ.pop(name, None)


def _noting_trainer() -> Any:
    """Return a Trainer that keeps the lengths of each microbatch's rows, its labels and its places."""
    from transformers import Trainer

    class Noting(Trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.noted: list[tuple[torch.Tensor, torch.Tensor, int]] = []

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            mask = inputs["attention_mask"]
            self.noted.append((mask.sum(1), (inputs["labels"] != -100).sum(), mask.numel()))
            return super().compute_loss(model, inputs, *args, **kwargs)

    return Noting


def _step_clock(warm_up: int) -> Any:
    """Return a callback that notes the time and the number of microbatches after each optimizer step."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        count: list[Any]

        def __init__(self) -> None:
            self.marks: list[Mark] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not args.use_cpu and state.global_step in (warm_up, args.max_steps):
                torch.cuda.synchronize()  # only where the time counts: Trainer itself does not wait for the GPU
            self.marks.append(Mark.now(len(self.count)))

    return Clock()
