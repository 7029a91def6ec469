"""The task `pretraining`: masked, or masked and permuted, tokens of a token store."""

import math
from typing import Any

from enc.encoder.config.schema import RunConfig
from enc.encoder.data.interface import Share, StepSizes
from enc.encoder.data.store_data import StoreData
from enc.encoder.evaluate.mlm import mlm_metrics
from enc.encoder.evaluate.sums import HeldOutSums
from enc.encoder.hardware import Hardware
from enc.encoder.models import build as models
from enc.encoder.models import fast_paths, first_weights
from enc.encoder.objectives.mlm import MlmObjective
from enc.encoder.ranks import Ranks
from enc.encoder.run.task import Lines, TrainMetrics
from enc.encoder.sizing.batch_split import split_batch
from enc.encoder.sizing.sizes import training_flops
from enc.encoder.tasks import TASKS


class Pretraining:
    """The task of a run config that pretrains."""

    record = TASKS["pretraining"]

    def __init__(self, config: RunConfig, ranks: Ranks, hardware: Hardware) -> None:
        self.config = config
        self.data = StoreData.open(config)
        split = split_batch(config.trainer, ranks.world_size)
        self.share = Share(split, ranks.rank, pin_memory=hardware.device.type == "cuda")
        self.model, self.objective = build_model(config, self.data.tokenizer.num_tokens)
        count = {"eval": config.trainer.eval_max_batches, "test": None}
        used = [name for name in count if name in self.data.splits]
        self.evaluations = {name: self.evaluation(name, count[name]) for name in used}

    def load_first_weights(self) -> None:
        first_weights.load(self.model, self.config.model, self.model.num_tokens)

    def evaluation(self, split: str, max_batches: int | None = None) -> HeldOutSums:
        batches = self.data.held_out_batches(split)
        return HeldOutSums(batches, mlm_metrics, batches.purpose, max_batches)

    def train_metrics(self, window: dict[str, float]) -> TrainMetrics:
        num_labels = window["num_labels"]
        loss = window["loss_sum"] / num_labels if num_labels else math.nan
        logsumexp = window["logsumexp_sum"] / num_labels if num_labels else math.nan
        accuracy = {"accuracy": window["num_correct"] / max(num_labels, 1)}
        return TrainMetrics(
            always={"loss": loss, "loss_bits": loss / math.log(2), "logsumexp": logsumexp},
            asked=accuracy if self.config.trainer.log_train_accuracy else {},
        )

    def flops(self, sizes: StepSizes) -> int:
        whole_last_layer = not self.config.trainer.last_layer_of_labels_only
        return training_flops(self.config.model, sizes.positions, sizes.keys, sizes.pairs, sizes.size, whole_last_layer)

    def describe(self, first_step: int) -> Lines:
        folder = None if first_step else first_weights.folder_of(self.config.model)
        held_out = self.evaluations
        unused = "none: the store has no eval split" if self.config.trainer.eval_strategy != "no" else "off"
        return [
            ("objective", _describe_objective(self.config)),
            *([("first weights", str(folder))] if folder else []),
            ("data", self.data.describe(self.share)),
            ("evaluation", held_out["eval"].describe() if "eval" in held_out else unused),
            *([("test", f"{held_out['test'].describe()}, after the last step")] if "test" in held_out else []),
        ]

    def describe_computation(self, hardware: Hardware) -> Lines:
        trainer = self.config.trainer
        whole = [
            *(["the last layer of all tokens"] if not trainer.last_layer_of_labels_only else []),
            *(["logits of all tokens"] if not trainer.masked_logits_only_loss else []),
        ]
        return [
            *fast_paths.describe(self.config.model, hardware.device.type, hardware.dtype),
            ("last layer", f"whole: {' and '.join(whole)}" if whole else "labelled tokens only, like the logits"),
        ]


def _describe_objective(config: RunConfig) -> str:
    collator, name = config.datacollator, config.trained_objective
    chosen = {"mlm": "masked", "mpnet": "masked and permuted", "plm": "permuted"}[name]
    return f"{name}: {collator.mlm_probability:.1%} of the tokens {chosen}{', whole words' * collator.whole_word}"


def build_model(config: RunConfig, num_tokens: int) -> tuple[Any, MlmObjective]:
    """Return the model with its first weights, a `MaskedLanguageModel`, and its training objective."""
    model: Any = models.build_model(config.model, num_tokens)
    models.init_weights(model, config.parameters, config.seed)
    trainer, parallel = config.trainer, config.parallel
    if trainer.gradient_checkpointing:
        model.recompute(parallel.activation_checkpointing, parallel.activation_checkpointing_every)
    objective = MlmObjective(
        model,
        num_tokens,
        full_logits=not trainer.masked_logits_only_loss,
        full_last_layer=not trainer.last_layer_of_labels_only,
        bf16=trainer.bf16,
        z_loss=trainer.z_loss_weight,
        label_smoothing=trainer.label_smoothing_factor,
    )
    return model, objective
