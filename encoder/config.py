"""The run configuration: one frozen class a section; a field's docstring is its help text and its page in the docs.

Section and key names are NeoBERT's where it has them, so its YAML loads. A field marked `NotBuilt` is known but has no
code behind it yet: any value but its default is refused with the sentence given. A field marked `NoEffect` is accepted
for compatibility: another value than its default draws a warning that says why nothing depends on it.

Reading YAML, overrides and all error reporting: `enc.encoder.config_load`. Rules that span fields: `config_checks`.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag


@dataclass(frozen=True)
class NotBuilt:
    """Marks a field whose feature does not exist yet; `what` completes the sentence 'X is not built yet'."""

    what: str


@dataclass(frozen=True)
class NoEffect:
    """Marks a field that is accepted but changes nothing; `why` is the reason shown in the warning."""

    why: str


def _yes_no(value: Any) -> Any:
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    return words.get(value.lower(), value) if isinstance(value, str) else value


def _precision(value: Any) -> Any:
    words = {True: "bf16", False: "no", "fp32": "no", "true": "bf16", "false": "no"}
    return words.get(value, value) if isinstance(value, bool | str) else value


def _model_type(value: Any) -> str:
    name = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return "mpnet" if name == "mpnet" else "neobert"


def _attention_name(value: Any) -> Any:
    return "flash_attn_varlen" if value in ("flash", "flash_attn") else value


def _kernels_name(value: Any) -> Any:
    return "fused" if value == "liger" else value


def _digits(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _one_line(value: str) -> str:
    if not value.isprintable():
        raise ValueError("must be one line of printable characters")
    return value


def _sbatch_option(value: str) -> str:
    if not re.fullmatch(r"--[a-z][a-z-]*(=.*)?", value):
        raise ValueError("must be one option with two dashes, e.g. --switches=1")
    return value


def _srun_option(value: str) -> str:
    if not re.fullmatch(r"--[a-z][a-z-]*(=.*)?|-[A-Za-z]\S*", value):
        raise ValueError("must be one option in one word, e.g. --cpu-bind=cores")
    return value


Bool = Annotated[bool, BeforeValidator(_yes_no)]
Count = Annotated[int, Field(ge=0)]
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
OpenFraction = Annotated[float, Field(gt=0, lt=1)]
Percent = Annotated[float, Field(ge=0, le=100)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Line = Annotated[str, Field(min_length=1), AfterValidator(_one_line)]
SbatchOption = Annotated[Line, AfterValidator(_sbatch_option)]
SrunOption = Annotated[Line, AfterValidator(_srun_option)]
WANDB_ID = r"^[A-Za-z0-9_-]{1,128}$"
_TIME_LIMIT = r"^[0-9]+(:[0-9]{1,2}){0,2}$|^[0-9]+-[0-9]{1,2}(:[0-9]{1,2}){0,2}$"


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class ModelConfig(Section):
    """What all architectures have."""

    type: Literal["neobert", "mpnet"] = "neobert"
    """Architecture; it decides which other keys this section has."""
    name: Annotated[str | None, NoEffect("it is a label only")] = None
    """Label of the architecture."""
    hidden_size: PositiveInt = 768
    """Width of the residual stream."""
    num_hidden_layers: PositiveInt = 12
    """Number of transformer blocks."""
    num_attention_heads: PositiveInt = 12
    """Number of attention heads; must divide `hidden_size`."""
    intermediate_size: PositiveInt = 3072
    """Feed-forward width; before the SwiGLU rule: `swiglu` makes it 2/3 of this, rounded up to a multiple of 8."""
    max_position_embeddings: PositiveInt = 512
    """Longest document piece, in tokens, that the model has positions for."""
    vocab_size: PositiveInt = 30522
    """Rows of the embedding. Taken from the tokenizer when a run starts, padded to a multiple of 128 with inert ids."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon of the norms."""
    attn_backend: Annotated[Literal["auto", "sdpa", "flash_attn_varlen"], BeforeValidator(_attention_name)] = "auto"
    """Attention kernels: the best there are, PyTorch's own only, or no start without fused ones."""
    kernel_backend: Annotated[Literal["auto", "torch", "fused"], BeforeValidator(_kernels_name)] = "auto"
    """Other kernels: fused ones on GPUs, PyTorch's own only, or no start without fused ones. `liger` means `fused`."""
    pad_token_id: Count = 0
    """Taken from the tokenizer when a run starts."""


class NeoBertConfig(ModelConfig):
    """NeoBERT (`model.type: neobert`)."""

    rope: Bool = True
    """Rotary positions; `false` uses a learned position table."""
    rms_norm: Bool = True
    """RMSNorm; `false` uses LayerNorm."""
    hidden_act: Literal["swiglu", "gelu"] = "swiglu"
    """Feed-forward kind."""
    dropout_prob: Probability = 0.0
    """Dropout after attention, after the feed-forward and inside attention."""
    embedding_init_range: PositiveFloat = 0.02
    """Embeddings start uniform in +- this."""
    decoder_init_range: PositiveFloat = 0.02
    """Linear layers start uniform in +- this."""
    classifier_init_range: PositiveFloat = 0.02
    """Standard deviation of a classification head's first weights; written into exported configs."""
    tie_word_embeddings: Bool = True
    """Use the embedding as the output matrix. Always untied with `ngpt`."""
    decoder_bias: Bool = False
    """Give an untied output matrix a bias, as the first published NeoBERT has."""
    final_logit_softcapping: PositiveFloat | None = None
    """Bend logits into +- this, c tanh(logit / c), as Gemma 2 does."""
    ngpt: Bool = False
    """Normalised transformer: unit-length hidden states instead of norms."""
    base_scale: PositiveFloat = 960**-0.5
    """Scale of the nGPT parameters' raw values."""
    from_hub: Annotated[Bool, NotBuilt("starting from a hub model")] = False
    """Start from published weights."""


class MpnetConfig(ModelConfig):
    """MPNet (`model.type: mpnet`): learned positions, T5's relative bias shared by all layers, a tied head."""

    type: Literal["neobert", "mpnet"] = "mpnet"
    """Architecture; it decides which other keys this section has."""
    hidden_act: Literal["gelu", "gelu_accurate", "relu", "relu2", "silu", "tanh", "linear"] = "gelu"
    """Activation of the feed-forward and of the head."""
    normalize_before: Bool = False
    """LayerNorm before attention and feed-forward (pre-LN), with one more at the end, instead of after them."""
    dropout_prob: Probability = 0.1
    """Dropout of the embeddings, after attention and after the feed-forward."""
    attention_dropout_prob: Probability = 0.1
    """Dropout of the attention weights."""
    activation_dropout_prob: Probability = 0.1
    """Dropout inside the feed-forward, after the activation."""
    relative_attention_num_buckets: Annotated[int, Field(ge=4)] | None = None
    """Buckets of the relative bias; by default 32 for every 512 positions, at least 32."""
    relative_attention_max_distance: PositiveInt | None = None
    """Distance from which on all share a bucket; by default 128 for every 512 positions, at least 128."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of the first weights."""
    init_from: Line | None = None
    """Hugging Face folder of an MPNet whose weights the run starts from."""

    @property
    def num_buckets(self) -> int:
        """Buckets of the relative bias, with annotated-mpnet's default."""
        return self.relative_attention_num_buckets or _grown(32, self.max_position_embeddings)

    @property
    def max_distance(self) -> int:
        """Distance from which on all share a bucket, with annotated-mpnet's default."""
        return self.relative_attention_max_distance or _grown(128, self.max_position_embeddings)


def _grown(of_512: int, positions: int) -> int:
    return -(-max(of_512, of_512 * positions // 512) // 8) * 8


AnyModelConfig = Annotated[
    Annotated[NeoBertConfig, Tag("neobert")] | Annotated[MpnetConfig, Tag("mpnet")], Discriminator(_model_type)
]


class DatasetConfig(Section):
    """Where text comes from, how it is split, and how it is loaded."""

    name: str = "refinedweb"
    """Source: `python-docs` (built in), a local file, folder or glob, or a `datasets` hub name."""
    config: str | None = None
    """Configuration name of a hub dataset."""
    path: str = ""
    """A local source or a finished token store; wins over `name`."""
    validation_file: Line | None = None
    """A local source of its own to evaluate on: a file, folder or glob. Excludes `eval_split`, `validation_split` and
    `eval_samples`."""
    test_file: Line | None = None
    """A local source of its own to test on at the end of a run: a file, folder or glob."""
    text_column: str | None = None
    """Column that holds the text; by default the first of text, sentence, content."""
    text_unit: Literal["line", "file"] = "line"
    """What one document is in plain text files."""
    min_text_length: PositiveInt = 1
    """Documents of fewer characters are left out."""
    max_seq_length: PositiveInt = 512
    """Row length in tokens; longer documents are cut into pieces, nothing is dropped."""
    train_split: str | None = None
    """Split to train on; `train` when the source has several."""
    eval_split: str | None = None
    """Split to evaluate on; wins over `validation_split` and `eval_samples`."""
    validation_split: OpenFraction | None = None
    """Share of the documents set aside for evaluation."""
    eval_samples: PositiveInt | None = None
    """Number of first documents set aside for evaluation; also caps an `eval_split`."""
    test_samples: PositiveInt | None = None
    """Number of documents after those of `eval_samples` set aside for a test at the end of a run. Excludes
    `test_file`."""
    pre_tokenize: Annotated[Bool, NoEffect("text is always tokenised once, into a token store")] = False
    """Tokenise before training."""
    pre_tokenize_output: str | None = None
    """Folder of the token store; `tokenized_data/<name>` by default."""
    num_proc: Count = 4
    """Processes that tokenise; at most one a core is used, 0 means all cores."""
    num_workers: Count | None = None
    """Processes a rank that prepare batches, 0 for none; by default 1 on the CPU, on GPUs 16 or one a core if fewer."""
    pin_memory: Bool = False
    """Copy batches into page-locked memory; always done on CUDA."""
    persistent_workers: Annotated[Bool, NoEffect("batch workers live as long as the run")] = True
    """Keep batch workers between epochs."""
    prefetch_factor: PositiveInt | None = None
    """Microbatches each worker prepares ahead; 4 by default."""
    cache_dir: str | None = None
    """Cache folder of `datasets` for hub sources."""
    trust_remote_code: Annotated[Bool, NoEffect("`datasets` no longer runs dataset scripts")] = False
    """Run a hub dataset's own script."""
    streaming: Annotated[Bool, NotBuilt("streaming")] = False
    """Read the source while training instead of from a token store."""
    shuffle_buffer_size: Annotated[PositiveInt, NoEffect("rows are shuffled over the whole epoch")] = 10000
    """Shuffle buffer of a streamed source, in documents."""
    load_all_from_disk: Annotated[Bool, NotBuilt("contrastive training")] = False
    """Contrastive: use the prepared sets only."""
    force_redownload: Annotated[Bool, NotBuilt("contrastive training")] = False
    """Contrastive: fetch the sets again."""
    min_length: Annotated[PositiveInt, NotBuilt("contrastive training")] = 5
    """Contrastive: shortest text, in tokens."""
    alpha: Annotated[PositiveFloat, NotBuilt("contrastive training")] = 1.0
    """Contrastive: sets are drawn with probability rows^alpha."""


class TokenizerTrainConfig(Section):
    """How to train a tokenizer on the corpus."""

    model: Literal["wordpiece", "bpe"] = "wordpiece"
    """WordPiece with BERT's normaliser, or byte-level BPE."""
    vocab_size: Annotated[int, Field(ge=128)] = 30522
    """Number of tokens, special ones included."""
    min_frequency: PositiveInt = 2
    """A merge needs at least this many occurrences."""
    lowercase: Bool = True
    """Lower-case the text (WordPiece only)."""
    max_documents: PositiveInt | None = None
    """Train on the first so many documents; all by default."""


class TokenizerConfig(Section):
    """The tokenizer: named, from a folder, or trained on the corpus."""

    name: str = "bert-base-uncased"
    """Hub name or folder."""
    path: str | None = None
    """Folder of a tokenizer; wins over `name`."""
    train: TokenizerTrainConfig | None = None
    """Train one on the corpus; wins over `path` and `name`."""
    revision: str | None = None
    """Revision of a hub tokenizer."""
    trust_remote_code: Bool = False
    """Allow a hub tokenizer's own code."""
    allow_special_token_rewrite: Bool = False
    """Add the special tokens that masked-language-model training needs to a tokenizer without them."""
    max_length: Annotated[PositiveInt, NoEffect("documents are cut at dataset.max_seq_length")] = 512
    """Longest tokenised text."""
    padding: Annotated[str, NoEffect("training has no padding")] = "max_length"
    """Padding mode."""
    truncation: Annotated[Bool, NoEffect("long documents are cut into pieces, never truncated")] = True
    """Truncate long documents."""
    vocab_size: Annotated[int | None, NoEffect("the size is the tokenizer's own")] = None
    """Size of the tokenizer."""


class DataCollatorConfig(Section):
    """How rows become masked batches."""

    mlm_probability: Annotated[float, Field(gt=0, le=1)] = 0.15
    """Share of a row's ordinary tokens that are labels; with a permutation, of each document piece."""
    mask_all: Bool = False
    """Every label becomes the mask token."""
    mask_replace_prob: Fraction = 0.8
    """Share of the labels that become the mask token."""
    random_replace_prob: Fraction = 0.1
    """Share of the labels that become a random token; the rest stays as it is."""
    whole_word: Bool = False
    """Choose whole words instead of single tokens. With a permutation, words are permuted, and one may be cut."""
    pack_sequences: Bool = False
    """Fill each row with whole documents; otherwise one document a row."""
    max_length: PositiveInt | None = None
    """Row length in tokens when packing; `dataset.max_seq_length` by default."""
    pad_to_multiple_of: Annotated[PositiveInt | None, NoEffect("training has no padding")] = None
    """Pad rows to a multiple of this."""


class MuonConfig(Section):
    """Settings of the MuonClip optimizer."""

    muon_beta: Beta = 0.95
    """Momentum."""
    muon_decay: NonNegativeFloat = 0.0
    """Weight decay of matrices."""
    ns_steps: Annotated[int, Field(ge=1, le=20)] = 5
    """Orthogonalisation steps."""
    enable_clipping: Bool = True
    """Clip attention logits."""
    clipping_threshold: PositiveFloat = 50.0
    """Largest attention logit."""
    clipping_alpha: Fraction = 0.5
    """Share of the correction that goes to the query."""
    clipping_warmup_steps: Count = 0
    """Steps before clipping starts."""
    clipping_interval: PositiveInt = 10
    """Steps between clippings."""
    clipping_qk_chunk_size: PositiveInt = 1024
    """Tokens a tile of the logit computation."""
    capture_last_microbatch_only: Bool = True
    """Look at one microbatch a step."""
    detect_anomalies: Bool = False
    """Check for non-finite values."""
    orthogonalization: Literal["polar_express", "newton_schulz"] = "polar_express"
    """Orthogonalisation method."""
    norm_factor: Literal["spectral", "match_rms_adamw", "none", "legacy_compat"] = "spectral"
    """Scale of the update."""
    algorithm: str | None = None
    """Old name of `orthogonalization`."""
    polar_express: bool | None = None
    """Old switch of `orthogonalization`."""
    clipping_layers_mapping: dict[str, Any] = {}
    """Names of the layers to clip."""


class OptimizerConfig(Section):
    """The optimizer. Norms and biases have no weight decay, and embeddings only if asked."""

    name: Literal["adamw", "adam", "muonclip"] = "adamw"
    """`adamw`, or `adam` whose weight decay is L2 on all parameters."""
    lr: PositiveFloat = 1e-4
    """Peak learning rate."""
    weight_decay: NonNegativeFloat = 0.01
    """Weight decay."""
    decay_embeddings: Bool = False
    """Decay embeddings (so a tied head), learned positions and the relative bias too, as annotated-mpnet does."""
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.999)
    """Decay rates of the two moments."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator."""
    muon_config: Annotated[MuonConfig | None, NotBuilt("MuonClip")] = None
    """Settings of MuonClip."""


class SchedulerConfig(Section):
    """Learning rate over the steps: linear warmup from 1e-4 of the peak, then the named shape, then its last value."""

    name: Literal["cosine", "linear", "polynomial", "polynomial_decay", "constant", "warmup_stable_decay"] = "cosine"
    """Shape after the warmup. `polynomial_decay` is fairseq's and annotated-mpnet's: update n of a warmup of W has
    n / W of the peak, and the last update has the end value."""
    warmup_steps: Count = 10000
    """Length of the warmup, in steps."""
    warmup_percent: Percent | None = None
    """Length of the warmup in percent of the total; wins over `warmup_steps`."""
    total_steps: PositiveInt | None = None
    """Steps that percentages and default ends refer to; `trainer.max_steps` by default."""
    decay_steps: PositiveInt | None = None
    """Step at which the decay ends (the total by default); with `warmup_stable_decay` the length of the last decay."""
    decay_percent: Percent | None = None
    """The same in percent of the total; wins over `decay_steps`. By default `warmup_stable_decay` uses 10."""
    final_lr_ratio: Fraction = 0.1
    """Last learning rate as a share of the peak."""
    power: PositiveFloat = 1.0
    """Exponent of `polynomial` and `polynomial_decay`."""


class TrainerConfig(Section):
    """The training loop."""

    output_dir: str = "./output"
    """The run folder."""
    overwrite_output_dir: Bool = False
    """Start a new run where an older one lies; the older one is moved to `<output_dir>.replaced-<n>`, not deleted."""
    max_steps: PositiveInt = 1_000_000
    """Number of optimizer steps."""
    per_device_train_batch_size: PositiveInt = 16
    """Rows of one microbatch on one rank."""
    gradient_accumulation_steps: PositiveInt = 1
    """Microbatches a rank adds up before a step."""
    global_batch_size: PositiveInt | None = None
    """Rows of one step over all ranks. Fixed when a run starts, so that it stays the same on other numbers of ranks."""
    per_device_eval_batch_size: PositiveInt = 32
    """Rows of one evaluation batch."""
    gradient_clipping: NonNegativeFloat | None = None
    """Largest norm of the gradient; longer gradients are scaled down to it. 0 or null is off."""
    max_nonfinite_steps: Count = 10
    """Updates with a non-finite loss or gradient are skipped; more than this many in one run stop it."""
    mixed_precision: Annotated[Literal["no", "bf16"], BeforeValidator(_precision)] = "bf16"
    """`bf16` runs matrix products in bfloat16 under autocast, weights stay fp32; `no` is fp32 throughout."""
    tf32: Bool = True
    """Allow TF32 for fp32 matrix products on CUDA."""
    use_cpu: Bool = False
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
    logging_steps: PositiveInt = 100
    """Steps between log lines."""
    log_train_accuracy: Bool = False
    """Log the share of labels predicted right during training."""
    log_weight_norms: Bool = True
    """Log the norm of all weights."""
    log_grad_norm: Annotated[Bool, NoEffect("the norm is always logged: the non-finite check needs it")] = True
    """Log the gradient norm."""
    eval_strategy: Literal["steps", "epoch", "no"] = "steps"
    """When to evaluate during training."""
    eval_steps: PositiveInt = 10000
    """Steps between evaluations; the last step is always evaluated."""
    eval_on_start: Bool = False
    """Evaluate before the first step."""
    eval_max_batches: PositiveInt | None = None
    """Evaluate at most so many batches, over all ranks. The test at the end takes all."""
    save_strategy: Literal["steps", "epoch", "best", "no"] = "steps"
    """When to save: every `save_steps`, or `best`: after an evaluation that is the best so far by
    `metric_for_best_model`, which is then eval_loss by default. On a signal and at the end in any case; with `no` only
    then."""
    save_steps: PositiveInt = 10000
    """Steps between checkpoints; the last step is always saved."""
    save_total_limit: Count | None = 3
    """Checkpoints to keep, the newest ones; 0 or null keeps all. The last good one and the best one are never
    deleted."""
    save_model: Annotated[Bool, NoEffect("every checkpoint has portable weights")] = True
    """Save portable weights."""
    min_free_disk_gb: NonNegativeFloat = 0.0
    """GB that must stay free on the disk after a checkpoint is written."""
    resume_from_checkpoint: Annotated[bool | int | str | None, Field(union_mode="left_to_right")] = None
    """`latest` (or true), `best`, a step, or a checkpoint folder."""
    tensorboard_dir: Line | None = None
    """Folder of TensorBoard's files, from the working directory at launch; `<output_dir>/tensorboard` by default."""
    disable_tqdm: Bool = False
    """No progress bar."""
    enforce_full_packed_batches: Annotated[Bool, NoEffect("every microbatch has the same number of rows")] = True
    """Hold back undersized packed batches."""
    num_train_epochs: Annotated[PositiveInt, NotBuilt("GLUE fine-tuning")] = 3
    """GLUE: epochs."""
    early_stopping: Annotated[Count, NotBuilt("GLUE fine-tuning")] = 0
    """GLUE: evaluations without improvement before stopping."""
    metric_for_best_model: Literal["eval_loss", "eval_accuracy", "eval_perplexity"] | None = None
    """Metric of the evaluation whose best checkpoint is saved at once and never deleted; none by default."""
    greater_is_better: Annotated[Bool, NoEffect("the metric says it")] = True
    """Direction of that metric."""
    load_best_model_at_end: Annotated[Bool, NotBuilt("choosing a best model")] = False
    """Load the best model at the end."""
    dataloader_num_workers: Annotated[Count, NotBuilt("contrastive training")] = 0
    """Contrastive: processes that prepare batches."""

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


class ParallelConfig(Section):
    """How a step is spread over ranks."""

    engine: Literal["auto", "ddp", "fsdp", "deepspeed"] = "auto"
    """`ddp` keeps a whole copy of the model on each rank, `fsdp` and `deepspeed` shard it; `auto` chooses when a run
    starts, by the model's size, the memory of a device and the number of ranks."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 2
    """DeepSpeed: what is sharded over ranks. 0 nothing, 1 the moments, 2 the gradients too, 3 the weights too."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What lives in CPU memory: `optimizer` the moments and fp32 weights (ZeRO 1 to 3), `parameters` all of the state
    (ZeRO 3, FSDP)."""
    replicate: PositiveInt = 1
    """FSDP: groups of ranks that each hold a whole sharded model (hybrid sharding); must divide the number of ranks."""
    reshard_after_forward: Bool = True
    """FSDP: free a block's gathered weights after its forward pass; `false` keeps them for the backward pass."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """FSDP, DeepSpeed: arithmetic in which gradients are summed over ranks."""
    bucket_size: PositiveInt = 50_000_000
    """DeepSpeed: elements that are reduced or gathered at a time."""
    deepspeed_config: str | dict[str, Any] | None = None
    """DeepSpeed: a JSON file (or its contents) merged into what `enc render deepspeed` writes; its `auto` values are
    filled in."""
    activation_checkpointing: Literal["full", "selective"] = "full"
    """With `trainer.gradient_checkpointing`: recompute whole blocks, or all but matrix products and attention."""
    activation_checkpointing_every: PositiveInt = 1
    """With `trainer.gradient_checkpointing`: recompute every so many-th block."""


class SlurmConfig(Section):
    """How SLURM is asked for a job. A site profile (`launch.site`) fills in what a cluster always wants."""

    partition: Line | None = None
    """Partition, or several with commas."""
    account: Line | None = None
    """Account that pays."""
    qos: Line | None = None
    """Quality of service."""
    constraint: Line | None = None
    """Features that nodes must have."""
    reservation: Line | None = None
    """Reservation to run in."""
    time: Annotated[str, BeforeValidator(_digits), Field(pattern=_TIME_LIMIT)] | None = None
    """Time limit of one job: minutes, HH:MM:SS or D-HH:MM:SS. A run may take many; the partition's limit by default."""
    gpu_request: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    """How GPUs are asked for; `none` where a partition gives whole nodes. CPU runs never ask."""
    gpu_type: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")] | None = None
    """Type in the request for GPUs, e.g. `h100`."""
    cpus_per_task: PositiveInt | None = None
    """Cores for each rank."""
    mem: Annotated[str, BeforeValidator(_digits), Field(pattern=r"^[0-9]+[KMGT]?$")] | None = None
    """Memory of a node, e.g. `480G`; `0` is all of it."""
    exclusive: Bool = False
    """Ask for whole nodes."""
    exclude: list[Line] = []
    """Nodes to stay away from; those that failed are added by themselves."""
    after: Annotated[str, BeforeValidator(_digits), Field(pattern=r"^[0-9]+$")] | None = None
    """Start when this job has ended, whatever became of it."""
    continue_by: Literal["requeue", "resubmit", "array"] = "requeue"
    """How a run gets its next job: the same job is requeued; a new one is submitted from inside the old one; or all are
    submitted at once as an array that runs one task at a time."""
    array_size: Annotated[int, Field(ge=2)] = 10
    """Jobs of the array, with `continue_by: array`."""
    signal_s: Annotated[int, Field(gt=0, le=65535)] = 120
    """Seconds before the time limit at which SLURM itself gives a warning; the run stops earlier when its measured
    times ask for it."""
    directives: list[SbatchOption] = []
    """Further `#SBATCH` options, e.g. `--switches=1`; each is one option with its value as it is, without quotes."""
    rejected: list[Annotated[Line, Field(pattern=r"^--[a-z-]+$")]] = []
    """Options that this site does not allow; they are left out of scripts."""
    srun: list[SrunOption] = []
    """Further options of `srun`, e.g. `--cpu-bind=cores`; each is one word."""


class ContainerConfig(Section):
    """The container that ranks run in."""

    kind: Literal["none", "pyxis", "apptainer"] = "none"
    """Runtime: `pyxis` (srun --container-image) or `apptainer`."""
    image: Line | None = None
    """Image: a name or .sqsh file for pyxis, a .sif file or name for apptainer."""
    mounts: list[Line] = []
    """Folders to mount, `host:container`; the run folder, token store and working folder are mounted by themselves."""
    args: list[Line] = []
    """Further options of the runtime."""
    python: Line = "python3"
    """Python inside the container that has `enc`."""


class RestartsConfig(Section):
    """How often a run that was interrupted is started again, by cause. Config errors and `scancel` never restart it."""

    same_step: PositiveInt = 3
    """Attempts in a row that may end without getting further than those before; after them the run stops. Twice as many
    when processes, nodes or their starts failed."""
    crash: Count = 5
    """Restarts after an error of the training process."""
    lost_rank: Count = 20
    """Restarts after a process was killed or a node failed."""
    hang: Count = 10
    """Restarts after no rank had made progress for `launch.hang_timeout_s`."""


class LaunchConfig(Section):
    """Where the processes of a run start, and what happens when they are interrupted."""

    scheduler: Literal["auto", "local", "slurm"] = "auto"
    """`auto` submits to SLURM when several nodes, a site or any `launch.slurm` key is asked for, else starts here."""
    site: Line | None = None
    """Site profile: a name (`enc config sites` lists them) or a YAML file; its values are defaults of this section."""
    nodes: PositiveInt | None = None
    """Number of machines; one by default."""
    nproc_per_node: PositiveInt | None = None
    """Processes (ranks) on a machine; by default one a GPU, or one without GPUs."""
    gpu: Line | None = None
    """Kind of GPU on the machines, as `enc plan --gpu` names it; with it memory is checked before a job is queued."""
    modules: list[Line] = []
    """Environment modules to load."""
    setup: list[Line] = []
    """Shell lines to run before the job starts, e.g. to source a file."""
    env: dict[str, str] = {}
    """Environment variables of all processes of a job. Values are taken as they are: `$HOME` is not replaced."""
    python: Line | None = None
    """Python of the compute nodes that has `enc`; by default the one that runs this command."""
    snapshot_code: Bool = False
    """Copy `enc` itself into the run folder and run the copy, so that later edits do not reach a requeued job."""
    hang_timeout_s: PositiveFloat = 1800.0
    """Seconds without progress on any rank after which a job's processes are killed and started again."""
    heartbeat_s: PositiveFloat = 5.0
    """Seconds between two notes of a rank about what it is doing."""
    max_excluded_nodes: Count = 4
    """Failing nodes that a run may exclude by itself."""
    slurm: SlurmConfig = SlurmConfig()
    container: ContainerConfig = ContainerConfig()
    restarts: RestartsConfig = RestartsConfig()

    @property
    def num_nodes(self) -> int:
        return self.nodes or 1


class RunConfig(Section):
    """All that a run depends on."""

    task: Literal["pretraining", "glue", "mteb", "contrastive"] = "pretraining"
    """What to run."""
    seed: Count = 0
    """Seed of every random draw."""
    debug: Annotated[Bool, NoEffect("use `enc --debug`")] = False
    """Show more of what happens."""
    objective: Literal["auto", "mlm", "mpnet", "plm"] = "auto"
    """What is learnt: `mlm` masked tokens; `mpnet` masked and permuted tokens, `plm` permuted ones, both with an MPNet
    only. `auto` is `mpnet` for an MPNet, else `mlm`."""
    model: AnyModelConfig = NeoBertConfig()
    dataset: DatasetConfig = DatasetConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    datacollator: DataCollatorConfig = DataCollatorConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    trainer: TrainerConfig = TrainerConfig()
    contrastive: ContrastiveConfig = ContrastiveConfig()
    glue: GlueConfig = GlueConfig()
    mteb: MtebConfig = MtebConfig()
    wandb: WandbConfig = WandbConfig()
    parallel: ParallelConfig = ParallelConfig()
    launch: LaunchConfig = LaunchConfig()
    pretrained_checkpoint: Annotated[str | int, NotBuilt("starting from another run's weights")] = "latest"
    """Checkpoint that evaluation or fine-tuning starts from."""
    use_deepspeed: Annotated[Bool, NoEffect("checkpoints are told apart by their files")] = False
    """The checkpoint to load was written by DeepSpeed."""
    accelerate_config_file: Annotated[str | None, NoEffect("`enc` starts its own processes")] = None
    """Accelerate's settings file."""
    config_path: Annotated[str | None, NoEffect("the file is named on the command line")] = None
    """File that the config was read from."""
    pretraining_metadata: Annotated[dict[str, Any], NoEffect("it is a note only")] = {}
    """Notes."""

    @property
    def trained_objective(self) -> str:
        """What is learnt: `objective`, with `auto` resolved."""
        if self.objective != "auto":
            return self.objective
        return "mpnet" if isinstance(self.model, MpnetConfig) else "mlm"

    @property
    def row_length(self) -> int:
        """Tokens a row holds, special tokens included."""
        packed = self.datacollator.max_length if self.datacollator.pack_sequences else None
        return packed or self.dataset.max_seq_length

    def changed(self, updates: dict[str, Any]) -> "RunConfig":
        """Return a copy with dotted keys set, e.g. ``{"trainer.global_batch_size": 64}``; values are trusted."""
        result = self
        for key, value in updates.items():
            result = _with(result, key.split("."), value)
        return result

    def to_yaml(self) -> str:
        """Return the whole config as YAML that loads back to an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _with(section: Any, path: list[str], value: Any) -> Any:
    first, *rest = path
    return section.model_copy(update={first: _with(getattr(section, first), rest, value) if rest else value})


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested mapping as ``{dotted key: value}``."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


# Keys that decide where a run happens and what it shows, but not which numbers it computes.
_FREE_SECTIONS = ("launch", "parallel", "wandb", "debug")
_FREE_KEYS = {
    "dataset": "path pre_tokenize_output num_proc num_workers pin_memory persistent_workers prefetch_factor cache_dir",
    "trainer": """output_dir use_cpu overwrite_output_dir resume_from_checkpoint disable_tqdm max_nonfinite_steps
        per_device_train_batch_size gradient_accumulation_steps per_device_eval_batch_size
        logging_steps log_train_accuracy log_weight_norms eval_strategy eval_steps eval_on_start eval_max_batches
        save_strategy save_steps save_total_limit min_free_disk_gb metric_for_best_model greater_is_better
        tensorboard_dir""",
}


def keeps_numbers(key: str) -> bool:
    """Tell whether a change of this dotted key leaves data, masks and maths of the run the same."""
    section, _, name = key.partition(".")
    return section in _FREE_SECTIONS or name in _FREE_KEYS.get(section, "").split()


def differences(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Return ``{dotted key: (old, new)}`` of the values that differ."""
    before, after = flatten(old.model_dump(mode="json")), flatten(new.model_dump(mode="json"))
    keys = dict.fromkeys([*before, *after])
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}
