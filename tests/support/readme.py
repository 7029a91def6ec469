"""The README's reader: its my.yaml with a smaller model on shorter rows, and a corpus of the pages themselves."""

import re
from pathlib import Path

from places import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SMALLER = {
    "hidden_size: 256": "hidden_size: 64",
    "intermediate_size: 768": "intermediate_size: 128",
    "max_seq_length: 512": "max_seq_length: 128",
    "vocab_size: 8192": "vocab_size: 2048",
    "per_device_train_batch_size: 8": "per_device_train_batch_size: 4",
}


def blocks(page: Path, language: str) -> list[str]:
    """Return the blocks of code of a page in one language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.S)


def make_reader(folder: Path) -> None:
    """Fill a folder as the README describes it: my.yaml and corpus/."""
    config = blocks(ROOT / "README.md", "yaml")[0]
    for size, smaller in SMALLER.items():
        assert size in config
        config = config.replace(size, smaller)
    (folder / "my.yaml").write_text(config)
    (folder / "corpus").mkdir()
    for path in PAGES:
        for number, part in enumerate(path.read_text().split("\n\n")):
            (folder / "corpus" / f"{path.stem}-{number}.txt").write_text(part)
