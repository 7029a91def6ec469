"""The token store of a run: opened once, made or checked with a progress bar, and what a plan needs to know of it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from enc.encoder.config.schema import RunConfig
from enc.encoder.data.config import DatasetConfig
from enc.encoder.data.sources.find import store_path
from enc.encoder.files import read_json
from enc.encoder.printable import Say

if TYPE_CHECKING:
    from enc.encoder.data.store import TokenStore


@dataclass(frozen=True)
class StoreFacts:
    """What one opening of a token store told; `opened` is None while it is still to be made."""

    path: Path
    opened: "TokenStore | None" = None
    pad_token_id: int | None = None

    @property
    def manifest(self) -> dict[str, Any] | None:
        """What the store says of itself."""
        return self.opened.manifest if self.opened else None

    @property
    def tokenizer_dir(self) -> Path | None:
        """The tokenizer that made the ids."""
        return self.opened.tokenizer_dir if self.opened else None

    @property
    def num_tokens(self) -> int | None:
        """Tokens that the tokenizer knows."""
        return self.opened.manifest["tokenizer"]["num_tokens"] if self.opened else None

    @property
    def train_tokens(self) -> int | None:
        """Tokens of the training split, without special ones."""
        return self.opened.manifest["splits"]["train"]["tokens"] if self.opened else None

    @property
    def fingerprint(self) -> str | None:
        """Of the tokens and the tokenizer."""
        from enc.encoder.data.store import data_fingerprint

        return data_fingerprint(self.opened.manifest) if self.opened else None


def look_at_store(dataset: DatasetConfig) -> StoreFacts:
    """Open the token store of a dataset section, if it is there. Raises UsageError when it is damaged."""
    path = store_path(dataset).absolute()
    if not path.exists():
        return StoreFacts(path)
    from enc.encoder.data.store import TokenStore  # brings numpy and pyarrow along

    return _facts_of(TokenStore.open(path))


def _facts_of(opened: "TokenStore") -> StoreFacts:
    info = read_json(opened.path / "tokenizer_info.json")
    return StoreFacts(opened.path.absolute(), opened, info["pad_token_id"])


def make_store(config: RunConfig, say: Say, opened: "TokenStore | None" = None) -> StoreFacts:
    """Make the token store of a config, with a progress bar, and say what is in it; a finished one is checked.

    `opened` is the finished one if it was opened before. Raises UsageError or RunError as `preprocess` does.
    """
    from enc.encoder.data.preprocess import made_store

    path = store_path(config.dataset)
    existed = (path / "manifest.json").is_file()
    with _progress_bar(visible=not existed) as show:
        done = made_store(config.dataset, config.tokenizer, config.seed, show, opened)
    counts = "; ".join(
        f"{name} {split['documents']:,} documents, {split['tokens']:,} tokens"
        for name, split in done.manifest["splits"].items()
    )
    say(f"{'Using the token store' if existed else 'Made the token store'} {path}: {counts}.")
    return _facts_of(done)


@contextmanager
def _progress_bar(visible: bool) -> Iterator[Callable[[int, int | None, int], None]]:
    """Show how far tokenising is, on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("Tokenising"), BarColumn(), TextColumn("{task.fields[tokens]}"), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None, tokens="", visible=visible)

        def show(done: int, total: int | None, tokens: int) -> None:
            progress.update(task, completed=done, total=total, tokens=f"{tokens:,} tokens")

        yield show
