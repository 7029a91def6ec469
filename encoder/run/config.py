"""The config sections `trainer` and `wandb`."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from enc.encoder.section import Beta, Bool, Count, KeepsNumbers, Line, NoEffect, NonNegativeFloat, PositiveInt, Section
from enc.encoder.tasks import EvalMetric


def _precision(value: Any) -> Any:
    words = {True: "bf16", False: "no", "fp32": "no", "true": "bf16", "false": "no"}
    return words.get(value, value) if isinstance(value, bool | str) else value


WANDB_ID = r"^[A-Za-z0-9_-]{1,128}$"


class TrainerConfig(Section):
    """The training loop."""

    output_dir: Annotated[str, KeepsNumbers()] = "./output"
    """The run folder."""
    overwrite_output_dir: Annotated[Bool, KeepsNumbers()] = False
    """Start a new run where an older one lies; the older one is moved to `<output_dir>.replaced-<n>`, not deleted."""
    max_steps: PositiveInt = 1_000_000
    """Number of optimizer steps."""
    per_device_train_batch_size: Annotated[PositiveInt, KeepsNumbers()] = 16
    """Rows of one microbatch on one rank."""
    gradient_accumulation_steps: Annotated[PositiveInt, KeepsNumbers()] = 1
    """Microbatches a rank adds up before a step."""
    global_batch_size: PositiveInt | None = None
    """Rows of one step over all ranks. Fixed when a run starts, so that it stays the same on other numbers of ranks."""
    per_device_eval_batch_size: Annotated[PositiveInt, KeepsNumbers()] = 32
    """Rows of one evaluation batch."""
    gradient_clipping: NonNegativeFloat | None = None
    """Largest norm of the gradient; longer gradients are scaled down to it. 0 or null is off."""
    max_nonfinite_steps: Annotated[Count, KeepsNumbers()] = 10
    """Updates with a non-finite loss or gradient are skipped; more than this many in one run stop it."""
    mixed_precision: Annotated[Literal["auto", "no", "bf16"], BeforeValidator(_precision)] = "auto"
    """`bf16` runs matrix products in bfloat16 under autocast, weights stay fp32; `no` is fp32 throughout. `auto` is
    settled when a run starts: bf16 on GPUs that have it; on CPUs bf16 where they have instructions for it and the model
    is at least 384 wide, else fp32."""
    tf32: Bool = True
    """Allow TF32 for fp32 matrix products on CUDA."""
    use_cpu: Annotated[Bool, KeepsNumbers()] = False
    """Train on the CPU even where there is a GPU."""
    masked_logits_only_loss: Bool = True
    """Compute logits of labelled tokens only; `false` computes all of them, as an ablation."""
    last_layer_of_labels_only: Bool = True
    """Compute the last layer for labelled tokens only, to which nothing is lost; `false` is an ablation."""
    label_smoothing_factor: Beta = 0.0
    """Share of the target's probability that is spread over all tokens in the training loss."""
    z_loss_weight: NonNegativeFloat = 0.0
    """Weight of the squared logsumexp in the training loss, which keeps logits from drifting; PaLM took 1e-4."""
    gradient_checkpointing: Bool = False
    """Recompute blocks in the backward pass to save memory; `parallel.activation_checkpointing` says what of them."""
    torch_compile: Bool = False
    """Compile the model with `torch.compile`."""
    torch_compile_backend: Literal["inductor", "aot_eager", "eager"] = "inductor"
    """Backend of `torch.compile`."""
    torch_compile_dynamic: Bool | None = None
    """Dynamic shapes in `torch.compile`; true by default, since the number of tokens differs from batch to batch."""
    logging_steps: Annotated[PositiveInt, KeepsNumbers()] = 100
    """Steps between log lines."""
    log_train_accuracy: Annotated[Bool, KeepsNumbers()] = False
    """Log the share of labels predicted right during training."""
    log_weight_norms: Annotated[Bool, KeepsNumbers()] = True
    """Log the norm of all weights."""
    log_grad_norm: Annotated[Bool, NoEffect("the norm is always logged: the non-finite check needs it")] = True
    """Log the gradient norm."""
    eval_strategy: Annotated[Literal["steps", "no"], KeepsNumbers()] = "steps"
    """When to evaluate during training."""
    eval_steps: Annotated[PositiveInt, KeepsNumbers()] = 10000
    """Steps between evaluations; the last step is always evaluated."""
    eval_on_start: Annotated[Bool, KeepsNumbers()] = False
    """Evaluate before the first step."""
    eval_max_batches: Annotated[PositiveInt | None, KeepsNumbers()] = None
    """Evaluate at most so many batches, over all ranks. The test at the end takes all."""
    save_strategy: Annotated[Literal["steps", "best", "no"], KeepsNumbers()] = "steps"
    """When to save: every `save_steps`, or `best`: after an evaluation that is the best so far by
    `metric_for_best_model`, which is then eval_loss by default. On a signal and at the end in any case; with `no` only
    then."""
    save_steps: Annotated[PositiveInt, KeepsNumbers()] = 10000
    """Steps between checkpoints; the last step is always saved."""
    save_total_limit: Annotated[Count | None, KeepsNumbers()] = 3
    """Checkpoints to keep, the newest ones; 0 or null keeps all. The last good one and the best one are never
    deleted."""
    save_model: Annotated[Bool, NoEffect("every checkpoint has portable weights")] = True
    """Save portable weights."""
    min_free_disk_gb: Annotated[NonNegativeFloat, KeepsNumbers()] = 0.0
    """GB that must stay free on the disk after a checkpoint is written."""
    resume_from_checkpoint: Annotated[bool | int | str | None, Field(union_mode="left_to_right"), KeepsNumbers()] = None
    """`latest` (or true), `best`, a step, or a checkpoint folder."""
    tensorboard_dir: Annotated[Line | None, KeepsNumbers()] = None
    """Folder of TensorBoard's files, from the working directory at launch; `<output_dir>/tensorboard` by default."""
    disable_tqdm: Annotated[Bool, KeepsNumbers()] = False
    """No progress bar."""
    enforce_full_packed_batches: Annotated[Bool, NoEffect("every microbatch has the same number of rows")] = True
    """Hold back undersized packed batches."""
    metric_for_best_model: Annotated[EvalMetric | None, KeepsNumbers()] = None
    """Metric of the evaluation whose best checkpoint is saved at once and never deleted; none by default."""
    greater_is_better: Annotated[Bool, NoEffect("the metric says it"), KeepsNumbers()] = True
    """Direction of that metric."""

    @property
    def bf16(self) -> bool:
        """Whether matrix products are in bfloat16; `auto` counts as that where no launch has settled it."""
        return self.mixed_precision != "no"

    @property
    def best_metric(self) -> str | None:
        """The metric that chooses the best checkpoint, if one is chosen."""
        return self.metric_for_best_model or ("eval_loss" if self.save_strategy == "best" else None)


class WandbConfig(Section):
    """Weights & Biases, on request; the run id stays the same over resumes."""

    enabled: Bool = False
    """Log to W&B."""
    project: str = "neo-bert"
    """Project."""
    entity: str | None = None
    """User or team."""
    name: str | None = None
    """Name of the run."""
    id: Annotated[str, Field(pattern=WANDB_ID)] | None = None
    """Id of the W&B run, letters, digits, - and _; made at the first start by default."""
    tags: list[str] = []
    """Tags of the run."""
    mode: Literal["online", "offline", "disabled"] = "online"
    """Where W&B keeps its data."""
    dir: str = "logs/wandb"
    """Folder of W&B's files, inside the run folder unless absolute."""
    watch: Annotated[str, NoEffect("gradients and weights are summarised by their norms")] = "gradients"
    """What W&B samples from the model."""
    resume: Annotated[str, NoEffect("a resumed run always continues its W&B run")] = "never"
    """How W&B resumes."""
    log_interval: Annotated[PositiveInt, NoEffect("trainer.logging_steps decides")] = 100
    """Steps between log lines."""
