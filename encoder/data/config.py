"""The config sections `dataset`, `tokenizer` and `datacollator`."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from enc.encoder.section import (
    Bool,
    Count,
    Fraction,
    KeepsNumbers,
    Line,
    NoEffect,
    OpenFraction,
    PositiveInt,
    Section,
)


class DatasetConfig(Section):
    """Where text comes from, how it is split, and how it is loaded."""

    name: str = "refinedweb"
    """Source: `python-docs` (built in), a local file, folder or glob, or a `datasets` hub name."""
    config: str | None = None
    """Configuration name of a hub dataset."""
    path: Annotated[str | list[Line], KeepsNumbers()] = ""
    """A local source, a list of sources of files, or a finished token store; wins over `name`."""
    validation_file: Line | None = None
    """A local source of its own to evaluate on: a file, folder or glob. Excludes `eval_split`, `validation_split` and
    `eval_samples`."""
    test_file: Line | None = None
    """A local source of its own to test on at the end of a run: a file, folder or glob."""
    text_column: str | list[Line] | None = None
    """Column that holds the text, or a list: the first of them that a file has. By default text, sentence, content."""
    text_unit: Literal["line", "file"] = "line"
    """What one document is in plain text files."""
    min_text_length: PositiveInt = 1
    """Documents of fewer characters are left out."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What to do with a row that cannot be read (no JSON, no UTF-8, no text in its column): stop, or leave it out and
    count it."""
    max_seq_length: PositiveInt = 512
    """Row length in tokens; longer documents are cut into pieces, nothing is dropped."""
    train_split: str | None = None
    """Split to train on; `train` when the source has several. `all` takes all files, whatever their names."""
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
    pre_tokenize_output: Annotated[str | None, KeepsNumbers()] = None
    """Folder of the token store; `tokenized_data/<name>` by default."""
    num_proc: Annotated[Count, KeepsNumbers()] = 4
    """Processes that tokenise; at most one a core is used, 0 means all cores."""
    num_workers: Annotated[Count | None, KeepsNumbers()] = None
    """Processes a rank that prepare batches, 0 for none; by default 1 on the CPU, on GPUs 16 or one a core if fewer."""
    pin_memory: Annotated[Bool, NoEffect("it is always done on CUDA"), KeepsNumbers()] = False
    """Copy batches into page-locked memory."""
    persistent_workers: Annotated[Bool, NoEffect("batch workers live as long as the run"), KeepsNumbers()] = True
    """Keep batch workers between epochs."""
    prefetch_factor: Annotated[PositiveInt | None, KeepsNumbers()] = None
    """Microbatches each worker prepares ahead; 4 by default."""
    cache_dir: Annotated[str | None, KeepsNumbers()] = None
    """Cache folder of `datasets` for hub sources."""
    trust_remote_code: Annotated[Bool, NoEffect("`datasets` no longer runs dataset scripts")] = False
    """Run a hub dataset's own script."""
    shuffle_buffer_size: Annotated[PositiveInt, NoEffect("rows are shuffled over the whole epoch")] = 10000
    """Shuffle buffer of a streamed source, in documents."""

    @property
    def paths(self) -> list[str]:
        """The sources that `path` names."""
        return list(filter(None, [self.path] if isinstance(self.path, str) else self.path))

    @property
    def store(self) -> Path:
        """The token store of a run, which its own config names in `path`."""
        return Path(*self.paths)


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
    limit_alphabet: PositiveInt | None = None
    """The most frequent characters, so many, are in a WordPiece vocabulary; words with others are unknown. By default
    1,000, more where these are less than 99.9 % of the text, and at most a quarter of `vocab_size`."""
    max_input_chars_per_word: PositiveInt = 100
    """Longer words are one unknown token (WordPiece only); in a script without blanks a whole sentence is a word."""
    max_documents: PositiveInt | None = None
    """Train on the first so many documents; all by default."""

    def identity(self) -> dict[str, Any]:
        """Return what tells trained tokenizers apart; newer keys count where they are set."""
        newer = ("limit_alphabet", "max_input_chars_per_word")
        unset = {name for name in newer if getattr(self, name) == TokenizerTrainConfig.model_fields[name].default}
        return {name: value for name, value in self if name not in unset}


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
