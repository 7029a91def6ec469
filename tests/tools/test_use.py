"""`enc fill-mask` and `enc encode` give what the exported model gives."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from running import Enc
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

from enc.tools.encode import encode
from enc.tools.export import export_checkpoint
from enc.tools.fill_mask import fill, fill_held_out
from enc.tools.trained import Trained

pytestmark = pytest.mark.usefixtures("modules_cache")
REMOTE = {"trust_remote_code": True}
TEXTS = ["the list of names", "", "return a value when there is one, and raise an error if not"]


@pytest.fixture(scope="module")
def export(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "out"
    return export_checkpoint(finished_run / "checkpoints" / "6", folder, "fp32").folder


@pytest.fixture(scope="module")
def trained(finished_run: Path) -> Trained:
    return Trained.load(finished_run / "checkpoints" / "6")


@torch.no_grad()
def test_guesses_have_the_probabilities_of_the_export(trained: Trained, export: Path) -> None:
    """For each gap of a text, best first, whatever word for a gap is written."""
    tokenizer = AutoTokenizer.from_pretrained(export)
    batch = tokenizer("the [MASK] of a [MASK].", return_tensors="pt")
    logits = AutoModelForMaskedLM.from_pretrained(export, **REMOTE).eval()(**batch).logits[0]
    expected = logits[batch["input_ids"][0] == tokenizer.mask_token_id].softmax(-1).topk(3)
    for text in ("the [MASK] of a [MASK].", "the <mask> of a [MASK]."):
        gaps = fill(trained, text, top=3)
        found = torch.tensor([[chance for _, chance in gap.guesses] for gap in gaps])
        torch.testing.assert_close(found, expected.values, rtol=1e-4, atol=1e-7)
        words = [[tokenizer.decode([token]).strip() for token in row] for row in expected.indices.tolist()]
        assert [[word for word, _ in gap.guesses] for gap in gaps] == words


def test_drawn_texts_hide_a_word_that_says_something(trained: Trained) -> None:
    """Different texts, each with one gap where a word of letters stood, the same at every call."""
    gaps = fill_held_out(trained, 5)
    assert gaps == fill_held_out(trained, 5)
    assert len({gap.text for gap in gaps}) == 5
    for gap in gaps:
        assert gap.text.count("[MASK]") == 1
        assert gap.word
        assert gap.word.isalpha()
        assert gap.word not in ("the", "and", "for", "that", "with", "are")


@torch.no_grad()
def test_vectors_are_the_means_of_the_export(trained: Trained, export: Path) -> None:
    """Of texts and of nothing, in their order; of a long text over all of its pieces."""
    tokenizer = AutoTokenizer.from_pretrained(export)
    model = AutoModel.from_pretrained(export, **REMOTE).eval()
    found = encode(trained, [*TEXTS, "the list " * 50])
    for text, vector in zip(TEXTS, found, strict=False):
        states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        np.testing.assert_allclose(vector, states.mean(0).numpy(), rtol=1e-4, atol=1e-5)
    ids = tokenizer("the list " * 50, add_special_tokens=False)["input_ids"]
    assert len(ids) == 100
    pieces = [[tokenizer.cls_token_id, *part, tokenizer.sep_token_id] for part in (ids[:62], ids[62:])]
    states = torch.cat([model(torch.tensor([piece])).last_hidden_state[0] for piece in pieces])
    np.testing.assert_allclose(found[3], states.mean(0).numpy(), rtol=1e-4, atol=1e-5)


def test_the_commands(enc: Enc, finished_run: Path, trained: Trained) -> None:
    """Vectors go to numpy and Parquet, guesses to the terminal and to JSON; a run's latest checkpoint is meant."""
    run = str(finished_run)
    (enc.folder / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    assert enc("encode", run, "texts.txt").stdout.strip() == "texts.npy"
    enc("encode", run, "texts.txt", "--out", "texts.parquet")
    vectors = np.load(enc.folder / "texts.npy")
    np.testing.assert_allclose(vectors, encode(trained, TEXTS), rtol=1e-4, atol=1e-5)
    table = pq.read_table(enc.folder / "texts.parquet")
    assert table["text"].to_pylist() == TEXTS
    assert np.array_equal(np.array(table["vector"].to_pylist(), dtype=np.float32), vectors)
    rows = json.loads(enc("fill-mask", run, "the [MASK] of a list", "--top", "2", "--json").stdout)
    assert [len(row["guesses"]) for row in rows] == [2]
    shown = enc("fill-mask", run, "--count", "2").stdout
    assert shown.count("was: ") == shown.count("guessed: ") == 2
    assert "%" in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("fill-mask", "RUN", "no gap"), "[MASK]"),
        (("fill-mask", "RUN", "a [MASK] " * 90), "trained on 62"),
        (("encode", "RUN", "nothing.txt"), "nothing.txt"),
        (("encode", "RUN", "rows.jsonl"), "document on each line"),
        (("encode", "RUN", "latin.txt"), "UTF-8"),
        (("encode", "RUN", "empty.txt"), "empty"),
        (("encode", "RUN", "texts.txt", "--out", "taken.npy"), "taken.npy exists"),
        (("encode", "RUN", "texts.txt", "--out", "out.csv"), ".parquet"),
        (("encode", "nowhere", "texts.txt"), "nowhere"),
    ],
)
def test_what_cannot_be_done_is_a_sentence(words: tuple[str, ...], said: str, enc: Enc, finished_run: Path) -> None:
    """Exit code 2, no file is written and none is changed."""
    for name, content in (("rows.jsonl", b"{}"), ("latin.txt", b"gr\xfc\xdfe\n"), ("empty.txt", b""),
                          ("texts.txt", b"a\n"), ("taken.npy", b"mine")):  # fmt: skip
        (enc.folder / name).write_bytes(content)
    before = {path.name: path.read_bytes() for path in enc.folder.iterdir() if path.is_file()}
    done = enc(*(str(finished_run) if word == "RUN" else word for word in words), code=2)
    assert said in done.stderr
    assert {path.name: path.read_bytes() for path in enc.folder.iterdir() if path.is_file()} == before
