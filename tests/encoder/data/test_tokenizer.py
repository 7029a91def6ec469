"""Tokenizers: training is deterministic, folders are Hugging Face's, piecewise encoding is exact."""

import json
import random
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

from enc.encoder.data.config import TokenizerConfig, TokenizerTrainConfig
from enc.encoder.data.encoding import DocumentEncoder
from enc.encoder.data.obtain import identity, obtain_tokenizer
from enc.encoder.data.tokenizer import EncoderTokenizer, describe, fingerprint, mend_saved
from enc.encoder.data.tokenizer_train import train_tokenizer
from enc.encoder.errors import UsageError

TRAIN = """
from pydoc_data.topics import topics
from enc.encoder.data.config import TokenizerTrainConfig
from enc.encoder.data.tokenizer_train import train_tokenizer
texts = [topics[name] for name in sorted(topics)] + ["Größe naïve xß 1² 5٣ aΣ don't 'still 中文 ١٢"] * 2000
def train(model, **more):
    return train_tokenizer(TokenizerTrainConfig(model=model, vocab_size=1000, **more), lambda: texts)
"""
scope: dict = {}
exec(TRAIN, scope)
texts, train = scope["texts"], scope["train"]


@pytest.fixture(scope="module")
def trained():
    return {model: train(model) for model in ("wordpiece", "bpe")}


@pytest.mark.parametrize("model", ["wordpiece", "bpe"])
def test_training_is_deterministic_across_processes(trained, model):
    """Another process, with other hash seeds, trains the identical tokenizer."""
    code = TRAIN + f"print(train({model!r}).fingerprint())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == trained[model].fingerprint()


@pytest.mark.parametrize("model", ["wordpiece", "bpe"])
def test_padding_at_one_moves_special_tokens_only(trained, model):
    """Where transformers' MPNet has it; every other token keeps its id, and so does `[MASK]`."""
    moved = train_tokenizer(TokenizerTrainConfig(model=model, vocab_size=1000), lambda: texts, pad_id=1)
    assert (moved.cls_id, moved.pad_id, moved.sep_id, moved.mask_id) == (0, 1, 2, 4)
    before, after = trained[model].tokenizer.get_vocab(), moved.tokenizer.get_vocab()
    assert {token for token in before if before[token] != after[token]} == {"[PAD]", "[UNK]", "[CLS]", "[SEP]"}
    ids = moved.tokenizer.encode("the statement").ids
    assert (ids[0], ids[-1]) == (0, 2)


@pytest.mark.parametrize("model", ["wordpiece", "bpe"])
def test_trained_tokenizer(trained, model):
    """Special tokens come first, the size is what was asked, and text comes back from its ids."""
    tokenizer = trained[model]
    assert tokenizer.num_tokens == 1000
    assert (tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id) == (0, 2, 3, 4)
    assert tokenizer.special_ids == (0, 1, 2, 3, 4)
    ids = tokenizer.tokenizer.encode("the statement of the class").ids
    assert ids[0] == 2
    assert ids[-1] == 3
    assert tokenizer.tokenizer.decode(ids) == "the statement of the class"


@pytest.mark.parametrize("model", ["wordpiece", "bpe"])
def test_auto_tokenizer_loads_the_saved_folder(trained, model, tmp_path):
    """AutoTokenizer gives the ids that we give, special tokens included, and knows the roles."""
    from transformers import AutoTokenizer

    trained[model].save(tmp_path / "tokenizer")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    ours = EncoderTokenizer.load(tmp_path / "tokenizer")
    assert ours.fingerprint() == trained[model].fingerprint()
    assert (ours.mask_id, ours.pad_id, ours.cls_id, ours.sep_id) == (4, 0, 2, 3)
    assert (theirs.mask_token_id, theirs.pad_token_id, theirs.cls_token_id, theirs.sep_token_id) == (4, 0, 2, 3)
    assert len(theirs) == ours.num_tokens
    for text in texts[:30]:
        assert theirs(text)["input_ids"] == ours.tokenizer.encode(text).ids


def test_continues_word(trained):
    """Pieces inside a word are marked; first pieces and special tokens are not."""
    for model, text, starts in (("wordpiece", "unhashability of", 2), ("bpe", " unhashability of", 2)):
        tokenizer = trained[model]
        ids = tokenizer.tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.continues_word.dtype == bool
        assert tokenizer.continues_word.shape == (tokenizer.num_tokens,)
        assert (~tokenizer.continues_word[ids]).sum() == starts < len(ids)
        assert not tokenizer.continues_word[list(tokenizer.special_ids)].any()
    vocab = {"<pad>": 0, "<mask>": 1, "▁": 2, "▁a": 3, "b": 4, "<s>": 7}
    metaspace = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    metaspace.pre_tokenizer = pre_tokenizers.Metaspace()
    described = describe(metaspace, {"pad": "<pad>", "mask": "<mask>", "cls": "<s>"}, "x")
    assert described.num_tokens == 8
    assert described.sep_id is None
    assert np.flatnonzero(described.continues_word).tolist() == [4]


def test_fingerprint_ignores_layout_but_not_content(trained):
    """Key order, truncation and padding do not count; a changed vocabulary does."""
    content = json.loads(trained["bpe"].tokenizer.to_str())
    turned = json.dumps(dict(reversed(content.items())) | {"truncation": {"max_length": 3}}, indent=4)
    assert fingerprint(turned) == trained["bpe"].fingerprint()
    content["model"]["merges"].pop()
    assert fingerprint(json.dumps(content)) != trained["bpe"].fingerprint()


HARD = "aB z\t\n\r 1'\".,-_[]sdtlvreMASK\x0b\x0c\x1c\x1f\x85\xa0\u200a\u2028\u3000é\u0301\u0130ßΣς中"
HARD += "\u037e\u2260\u212a\u200b\u00ad\x00\ufffd\U0001f600²½٣"
WORDS = ["Größe", "naïve", "xß", "1²", "5٣", "aΣ", "don't", "'still", "'s", "[MASK]", "the ", "  "]
PIECES = st.lists(
    st.one_of(st.characters(codec="utf-8"), st.sampled_from(HARD), st.sampled_from(WORDS)), max_size=30
).map("".join)


@pytest.mark.parametrize("model", ["wordpiece", "bpe", "cased"])
@settings(max_examples=400, deadline=None)
@given(text=PIECES)
def test_piecewise_encoding_is_exact(trained, model, text):
    """Encoding by remembered pieces gives exactly the tokenizer's own ids, for any text."""
    if model == "cased":
        tokenizer = Tokenizer.from_str(trained["wordpiece"].tokenizer.to_str())
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False, handle_chinese_chars=False, clean_text=False)
    else:
        tokenizer = trained[model].tokenizer
    encode = DocumentEncoder(tokenizer, np.dtype(np.uint16))
    assert encode.uses_pieces
    for _ in range(2):  # the second time from memory
        assert encode(text).tolist() == tokenizer.encode(text, add_special_tokens=False).ids


def test_special_tokens_in_text_and_other_pipelines_take_the_plain_path(trained):
    """Written-out special tokens, and pipelines whose cuts are not known, still give the tokenizer's own ids."""
    for model in ("wordpiece", "bpe"):
        tokenizer = trained[model].tokenizer
        encode = DocumentEncoder(tokenizer, np.dtype(np.uint32))
        for text in ("a [MASK] b", "x[SEP]y", *random.Random(0).sample(texts, 20)):
            assert encode(text).tolist() == tokenizer.encode(text, add_special_tokens=False).ids
    other = Tokenizer.from_str(trained["wordpiece"].tokenizer.to_str())
    other.pre_tokenizer = pre_tokenizers.Whitespace()
    encode = DocumentEncoder(other, np.dtype(np.uint32))
    assert not encode.uses_pieces
    assert encode("a b, c").tolist() == other.encode("a b, c", add_special_tokens=False).ids


def plain_folder(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    (tmp_path / "plain").mkdir()
    tokenizer.save(str(tmp_path / "plain" / "tokenizer.json"))
    return str(tmp_path / "plain")


def test_missing_mask_token(tmp_path):
    """Without a mask token there is an error, unless the RoBERTa-style tokens may be added."""
    folder = plain_folder(tmp_path)
    with pytest.raises(UsageError, match=r"no mask token.*allow_special_token_rewrite=true"):
        obtain_tokenizer(TokenizerConfig(path=folder), list)
    made = obtain_tokenizer(TokenizerConfig(path=folder, allow_special_token_rewrite=True), list)
    assert made.tokenizer.encode("a b").tokens == ["<s>", "a", "b", "</s>"]
    assert len({made.mask_id, made.pad_id, made.cls_id, made.sep_id}) == 4
    made.save(tmp_path / "made")
    assert EncoderTokenizer.load(tmp_path / "made").fingerprint() == made.fingerprint()


def test_unusable_tokenizers_are_named(tmp_path, trained):
    """Each way to fail to get a tokenizer says what was wrong."""
    with pytest.raises(UsageError, match="is not a folder"):
        identity(TokenizerConfig(path=str(tmp_path / "no")))
    (tmp_path / "bad").mkdir()
    with pytest.raises(UsageError, match=r"has no tokenizer\.json"):
        EncoderTokenizer.load(tmp_path / "bad")
    (tmp_path / "bad" / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match="not a readable tokenizer"):
        EncoderTokenizer.load(tmp_path / "bad")
    with pytest.raises(UsageError, match="no room for the bytes"):
        train_tokenizer(TokenizerTrainConfig(model="bpe", vocab_size=200), lambda: texts)
    with pytest.raises(UsageError, match="no text to train"):
        train_tokenizer(TokenizerTrainConfig(), lambda: [" \n"])


def test_max_documents_bounds_training():
    """Only the first documents are read."""
    section = TokenizerTrainConfig(vocab_size=300, max_documents=2)
    endless = iter(lambda: "x", "")
    assert train_tokenizer(section, lambda: islice(texts, 2)).fingerprint() == (
        train_tokenizer(section, lambda: (text for part in (texts[:2], endless) for text in part)).fingerprint()
    )


SPECIAL = {"unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>"}
OTHER_ROWS = {"nothing": None, "begins alone": "<s> $A", "ends alone": "$A </s>", "both at the end": "$A </s> <s>"}


def saved_with(template: str | None, folder: Path, words: str) -> Path:
    """Save a tokenizer of these words, whose post-processor writes `template`."""
    names = [*SPECIAL.values(), *words.split()]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL.values()])
    if template:
        ids = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(SPECIAL))
    return folder


@pytest.mark.parametrize("template", OTHER_ROWS.values(), ids=OTHER_ROWS)
def test_a_text_becomes_the_row_that_is_trained_on(template, tmp_path):
    """Whatever a tokenizer puts around a text, the one that is kept beside the tokens gives rows of training."""
    from transformers import AutoTokenizer

    folder = saved_with(template, tmp_path / "foreign", "sea salt and air")
    made = obtain_tokenizer(TokenizerConfig(path=str(folder)), list)
    made.save(tmp_path / "kept")
    kept = EncoderTokenizer.load(tmp_path / "kept")
    text = made.tokenizer.encode("air and salt", add_special_tokens=False).ids
    row = [kept.cls_id, *text, kept.sep_id]
    assert AutoTokenizer.from_pretrained(tmp_path / "kept")("air and salt")["input_ids"] == row == [1, 8, 7, 6, 2]
    mend_saved(folder)  # one that was kept before this was looked at
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).encode("air and salt").ids == row


def test_a_tokenizer_that_gives_training_rows_is_kept_byte_for_byte(trained, tmp_path):
    """Also one whose post-processor is written in another way."""
    trained["bpe"].save(tmp_path / "own")
    before = (tmp_path / "own" / "tokenizer.json").read_bytes()
    mend_saved(tmp_path / "own")
    assert (tmp_path / "own" / "tokenizer.json").read_bytes() == before
    folder = saved_with("<s> $A </s>", tmp_path / "foreign", "a b")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 1))
    tokenizer.save(str(folder / "tokenizer.json"))
    made = obtain_tokenizer(TokenizerConfig(path=str(folder)), list)
    assert json.loads(made.tokenizer.to_str())["post_processor"]["type"] == "RobertaProcessing"


def chinese(num_characters: int) -> list[str]:
    """Texts of so many characters, each in the ratio in which characters of a language fall off."""
    draw = random.Random(0)
    characters = [chr(0x4E00 + i) for i in range(num_characters)]
    weights = [1 / (i + 1) ** 0.7 for i in range(num_characters)]
    return ["".join(draw.choices(characters, weights, k=50)) for _ in range(2000)]


def unknown_share(tokenizer: EncoderTokenizer, some: list[str]) -> float:
    ids = [i for text in some for i in tokenizer.tokenizer.encode(text, add_special_tokens=False).ids]
    return ids.count(tokenizer.unknown_id) / len(ids)


def test_the_alphabet_grows_with_what_a_text_needs():
    """A thousand characters are not enough of Chinese; they stay enough of what they were enough for."""
    some = chinese(3000)
    assert unknown_share(train_tokenizer(TokenizerTrainConfig(vocab_size=30_000), lambda: some), some) < 0.002
    capped = TokenizerTrainConfig(vocab_size=30_000, limit_alphabet=1000)
    assert unknown_share(train_tokenizer(capped, lambda: some), some) > 0.2
    default, same = (TokenizerTrainConfig(vocab_size=30_000, limit_alphabet=limit) for limit in (None, 1000))
    assert train_tokenizer(default, lambda: texts).fingerprint() == train_tokenizer(same, lambda: texts).fingerprint()


def test_long_words_are_known_where_that_is_asked_for():
    """In a script without blanks a sentence is a word."""
    sentence = "ab" * 80
    for longest, tokens in ((100, ["[UNK]"]), (200, None)):
        section = TokenizerTrainConfig(vocab_size=128, max_input_chars_per_word=longest)
        got = train_tokenizer(section, lambda: ["ab ab", sentence]).tokenizer.encode(sentence, add_special_tokens=False)
        assert (got.tokens == tokens) if tokens else "[UNK]" not in got.tokens


def test_keys_that_are_not_set_leave_a_trained_tokenizer_what_it_was():
    """A store of before these keys is found again."""
    assert identity(TokenizerConfig(train=TokenizerTrainConfig())) == {
        "train": {
            "model": "wordpiece",
            "vocab_size": 30522,
            "min_frequency": 2,
            "lowercase": True,
            "max_documents": None,
        }
    }
    longer = TokenizerConfig(train=TokenizerTrainConfig(max_input_chars_per_word=200))
    assert identity(longer)["train"]["max_input_chars_per_word"] == 200


def test_unknown_ids_of_every_model(trained):
    """WordPiece and Unigram have one where they say so; byte-level BPE knows every text."""
    roles = {"pad": "<pad>", "mask": "<mask>"}
    pieces = [("<pad>", 0.0), ("<unk>", 0.0), ("<mask>", 0.0), ("a", -1.0)]
    assert describe(Tokenizer(models.Unigram(pieces, unk_id=1, byte_fallback=False)), roles, "x").unknown_id == 1
    assert trained["bpe"].unknown_id is None
    assert trained["wordpiece"].unknown_id == 1
