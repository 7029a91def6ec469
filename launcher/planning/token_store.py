"""The token store of a run: opened once, made or checked with a progress bar, and what a plan needs to know of it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enc.encoder.config.schema import RunConfig
from enc.encoder.data.config import DatasetConfig
from enc.encoder.data.manifest import data_fingerprint, open_manifest
from enc.encoder.data.notes import ignored_settings, source_notes, store_notes
from enc.encoder.data.sources.find import resolve_source, store_path
from enc.encoder.data.sources.summary import source_summary
from enc.encoder.files import read_json
from enc.encoder.models.registry import architecture_of
from enc.encoder.printable import Say
from enc.encoder.progress import Show, shown


@dataclass(frozen=True)
class StoreFacts:
    """What one opening of a token store told; `manifest` is None while it is still to be made."""

    path: Path
    manifest: dict[str, Any] | None = None
    pad_token_id: int | None = None

    @property
    def tokenizer_dir(self) -> Path | None:
        """The tokenizer that made the ids."""
        return self.path / "tokenizer" if self.manifest else None

    @property
    def num_tokens(self) -> int | None:
        """Tokens that the tokenizer knows."""
        return self.manifest["tokenizer"]["num_tokens"] if self.manifest else None

    @property
    def train_tokens(self) -> int | None:
        """Tokens of the training split, without special ones."""
        return self.manifest["splits"]["train"]["tokens"] if self.manifest else None

    @property
    def fingerprint(self) -> str | None:
        """Of the tokens and the tokenizer."""
        return data_fingerprint(self.manifest) if self.manifest else None


def look_at_store(dataset: DatasetConfig) -> StoreFacts:
    """Open the token store of a dataset section, if it is there. Raises UsageError when it is damaged."""
    path = store_path(dataset).absolute()
    return _facts_of(path, open_manifest(path)) if path.exists() else StoreFacts(path)


def _facts_of(path: Path, manifest: dict[str, Any]) -> StoreFacts:
    info = read_json(path / "tokenizer_info.json")
    return StoreFacts(path.absolute(), manifest, info["pad_token_id"])


def make_store(config: RunConfig, say: Say, found: StoreFacts | None = None, folder: Path | None = None) -> StoreFacts:
    """Make the token store of a config, with a progress bar, and say what is in it; a finished one is checked.

    `found` is what an earlier look told of it, `folder` the run that waits for it.
    Raises UsageError or RunError as `preprocess` does. Ctrl-C is answered by a word on what is kept, and passed on.
    """
    from enc.encoder.data.preprocess import made_store  # brings numpy and pyarrow along
    from enc.encoder.data.store import TokenStore

    opened = TokenStore(found.path, found.manifest) if found and found.manifest else None
    path = store_path(config.dataset)
    existed = (path / "manifest.json").is_file()
    pad_id = architecture_of(config.model).pad_id
    if not existed:
        for note in source_notes(source_summary(resolve_source(config.dataset), config.dataset)):
            say(note)
    try:
        with shown("Checking the token store" if existed else "Tokenising", folder) as show:
            done = made_store(config.dataset, config.tokenizer, config.seed, _with_tokens(show), opened, pad_id)
    except KeyboardInterrupt:
        say(_interrupted(path))
        raise
    counts = "; ".join(
        f"{name} {split['documents']:,} documents, {split['tokens']:,} tokens"
        for name, split in done.manifest["splits"].items()
    )
    say(f"{'Using the token store' if existed else 'Made the token store'} {path}: {counts}.")
    for note in (*store_notes(done.manifest), *_ignored(config.dataset, done.manifest)):
        say(note)
    return _facts_of(done.path, done.manifest)


def _ignored(dataset: DatasetConfig, manifest: dict[str, Any]) -> Iterator[str]:
    """Say what a config that names a finished store asks for in vain."""
    if store_path(dataset) in map(Path, dataset.paths):
        yield from ignored_settings(manifest, dataset.model_dump(exclude_defaults=True))


def _with_tokens(show: Show) -> Callable[[int, int | None, int], None]:
    return lambda done, total, tokens: show(done, total, f"{tokens:,} tokens")


def _interrupted(path: Path) -> str:
    partial = path.with_name(f"{path.name}.partial")
    if any(partial.glob("*/data-*")):
        return f"Interrupted: what is done is kept in {partial}, and the same command goes on with it."
    return "Interrupted: nothing of the token store was written yet."
