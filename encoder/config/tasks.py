"""Config sections of tasks that are known by name only."""

from typing import Annotated

from enc.encoder.section import Bool, Count, Fraction, NonNegativeFloat, NotBuilt, PositiveFloat, PositiveInt, Section


class GlueConfig(Section):
    """GLUE fine-tuning."""

    task_name: Annotated[str, NotBuilt("GLUE fine-tuning")] = "cola"
    """Task."""
    num_labels: Annotated[PositiveInt, NotBuilt("GLUE fine-tuning")] = 2
    """Number of classes."""
    max_seq_length: Annotated[PositiveInt, NotBuilt("GLUE fine-tuning")] = 128
    """Longest input, in tokens."""
    pretrained_model_path: Annotated[str | None, NotBuilt("GLUE fine-tuning")] = None
    """Config of the pretrained model."""
    pretrained_checkpoint_dir: Annotated[str | None, NotBuilt("GLUE fine-tuning")] = None
    """Run folder of the pretrained model."""
    pretrained_checkpoint: Annotated[str | int | None, NotBuilt("GLUE fine-tuning")] = None
    """Checkpoint step."""
    allow_random_weights: Annotated[Bool, NotBuilt("GLUE fine-tuning")] = False
    """Start from random weights."""
    classifier_dropout: Annotated[Fraction, NotBuilt("GLUE fine-tuning")] = 0.1
    """Dropout of the classifier."""
    classifier_init_range: Annotated[PositiveFloat, NotBuilt("GLUE fine-tuning")] = 0.02
    """Standard deviation of the classifier's first weights."""
    transfer_from_task: Annotated[Bool, NotBuilt("GLUE fine-tuning")] = False
    """Start from another task's model."""
    num_workers: Annotated[Count, NotBuilt("GLUE fine-tuning")] = 4
    """Processes that prepare batches."""
    preprocessing_num_proc: Annotated[Count, NotBuilt("GLUE fine-tuning")] = 4
    """Processes that tokenise."""


class ContrastiveConfig(Section):
    """Contrastive training."""

    temperature: Annotated[PositiveFloat, NotBuilt("contrastive training")] = 0.05
    """Temperature of the similarities."""
    pooling: Annotated[str, NotBuilt("contrastive training")] = "avg"
    """Pooling of the token vectors."""
    loss_type: Annotated[str, NotBuilt("contrastive training")] = "simcse"
    """Loss."""
    hard_negative_weight: Annotated[NonNegativeFloat, NotBuilt("contrastive training")] = 0.0
    """Weight of hard negatives."""
    pretraining_prob: Annotated[Fraction, NotBuilt("contrastive training")] = 0.3
    """Share of steps on plain text."""
    pretrained_checkpoint_dir: Annotated[str | None, NotBuilt("contrastive training")] = None
    """Run folder of the pretrained model."""
    pretrained_checkpoint: Annotated[str | int | None, NotBuilt("contrastive training")] = None
    """Checkpoint step."""
    allow_random_weights: Annotated[Bool, NotBuilt("contrastive training")] = False
    """Start from random weights."""


class MtebConfig(Section):
    """MTEB evaluation."""

    task_type: Annotated[str, NotBuilt("MTEB evaluation")] = "all"
    """Task types."""
    batch_size: Annotated[PositiveInt, NotBuilt("MTEB evaluation")] = 32
    """Texts a batch."""
    pooling: Annotated[str, NotBuilt("MTEB evaluation")] = "mean"
    """Pooling of the token vectors."""
    overwrite_results: Annotated[Bool, NotBuilt("MTEB evaluation")] = False
    """Replace older results."""
