"""Looking into a store: every number is that of the text."""

from pathlib import Path

import pytest

from enc.encoder.data.config import DatasetConfig, TokenizerConfig, TokenizerTrainConfig
from enc.encoder.data.inspect_store import LONGEST_SAMPLE, inspect_store
from enc.encoder.data.preprocess import preprocess
from enc.encoder.data.store import TokenStore
from enc.encoder.data.tokenizer import EncoderTokenizer
from enc.encoder.data.tokenizer_report import compare_tokenizers, text_sample
from enc.encoder.errors import UsageError

TEXTS = ["seen in both", "held out", "seen in both", "one two three", "one two three", "on" * 60, "long " * 300]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inspect")
    (root / "a.txt").write_text("\n".join(TEXTS))
    dataset = DatasetConfig(path=str(root / "a.txt"), eval_samples=2, pre_tokenize_output=str(root / "store"))
    section = TokenizerTrainConfig(vocab_size=128)
    return preprocess(dataset, TokenizerConfig(train=section), seed=0)


def test_numbers_are_those_of_the_text(made: Path) -> None:
    """Documents, tokens, characters, lengths, unknown and repeated text of each split."""
    found = inspect_store(made)["splits"]
    lengths = {split: [len(ids) for ids in TokenStore.open(made).split(split)] for split in ("train", "eval")}
    train, held_out = found["train"], found["eval"]
    assert (train["documents"], train["tokens"]) == (5, sum(lengths["train"]))
    assert train["characters_per_token"] == sum(map(len, TEXTS[2:])) / sum(lengths["train"])
    assert (train["unknown_tokens"], train["unknown_documents"]) == (1, 1)
    assert (train["repeated_documents"], train["also_in_train"]) == (1, None)
    assert (held_out["repeated_documents"], held_out["also_in_train"]) == (0, 1)
    histogram = train["lengths"]["histogram"]
    for row in histogram:
        inside = [n for n in lengths["train"] if row["from"] <= n <= row["to"]]
        assert (row["documents"], row["tokens"]) == (len(inside), sum(inside))
    assert sum(row["documents"] for row in histogram) == 5
    assert (train["lengths"]["shortest"], train["lengths"]["longest"]) == (1, max(lengths["train"]))


def test_samples_go_from_the_first_to_the_last_document(made: Path) -> None:
    """Decoded, and cut where they are long."""
    samples = inspect_store(made, num_samples=3)["splits"]["train"]["samples"]
    assert [sample["document"] for sample in samples] == [0, 2, 4]
    assert samples[0]["text"] == "seen in both"
    assert samples[2]["text"].startswith("long long")
    assert len(samples[2]["text"]) <= LONGEST_SAMPLE + 1
    assert inspect_store(made, num_samples=0)["splits"]["train"]["samples"] == []


def test_tokenizers_are_compared_on_a_text(made: Path, tmp_path: Path) -> None:
    """Compression, unknown text and used vocabulary of each; one that is not here says so."""
    (tmp_path / "new.txt").write_text("one two\nThree 第三\n\n")
    texts = text_sample(str(tmp_path / "new.txt"), 10)
    own = EncoderTokenizer.load(made / "tokenizer")
    first, same, missing = compare_tokenizers(own, [str(made / "tokenizer"), str(tmp_path)], texts)
    ids = [i for text in texts for i in own.tokenizer.encode(text, add_special_tokens=False).ids]
    assert first == same | {"tokenizer": own.name}
    assert first["tokens"] == len(ids)
    assert first["characters_per_token"] == len("one twoThree 第三") / len(ids)
    assert first["bytes_per_token"] == len("one twoThree 第三".encode()) / len(ids)
    assert first["tokens_per_word"] == len(ids) / 4
    assert first["unknown_share"] == ids.count(own.unknown_id) / len(ids) > 0
    assert first["used_share_of_vocabulary"] == len(set(ids)) / own.num_tokens
    assert "missing" in missing
    with pytest.raises(UsageError, match="does not exist"):
        text_sample(str(tmp_path / "no.txt"), 1)
