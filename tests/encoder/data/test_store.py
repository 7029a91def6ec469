"""The token store: exact, zero-copy, picklable, and loud about every kind of damage or mismatch."""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from enc.encoder.data import preprocess as preprocess_module
from enc.encoder.data.config import DatasetConfig, TokenizerConfig, TokenizerTrainConfig
from enc.encoder.data.manifest import check_matches, read_manifest
from enc.encoder.data.preprocess import preprocess, wanted_request
from enc.encoder.data.store import (
    END_OF_STREAM,
    Documents,
    TokenStore,
    arrow_schema,
    record_batch_bytes,
    token_dtype,
    verify,
)
from enc.encoder.data.tokenizer import EncoderTokenizer
from enc.encoder.errors import UsageError

TEXTS = [f"document {i} has {'many ' * (i % 7)}words, sir" for i in range(500)]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A store of 500 documents in several record batches and data files."""
    root = tmp_path_factory.mktemp("built")
    (root / "a.txt").write_text("\n".join(TEXTS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preprocess_module, "FIRST_CHUNK_BYTES", 1000)
        patch.setattr(preprocess_module, "CHUNK_BYTES", 3000)
        patch.setattr("enc.encoder.data.store.SHARD_BYTES", 3000)
        dataset = DatasetConfig(path=str(root / "a.txt"), eval_samples=100, pre_tokenize_output=str(root / "store"))
        return preprocess(dataset, TokenizerConfig(train=TokenizerTrainConfig(vocab_size=300)), seed=0)


@pytest.fixture
def store_copy(built, tmp_path):
    return shutil.copytree(built, tmp_path / "copy")


def test_every_document_is_there_once_in_order(built):
    """Each document's ids are the tokenizer's own for its text, and nothing else is stored."""
    opened = TokenStore.open(built)
    tokenizer = EncoderTokenizer.load(opened.tokenizer_dir)
    assert opened.splits == ("train", "eval")
    assert len(list(built.glob("train/data-*.arrow"))) > 2
    for split, texts in (("eval", TEXTS[:100]), ("train", TEXTS[100:])):
        documents = opened.split(split)
        wanted = [tokenizer.tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        assert [ids.tolist() for ids in documents] == wanted
        assert documents.lengths.dtype == np.int32
        assert documents.lengths.tolist() == [len(ids) for ids in wanted]
        assert opened.manifest["splits"][split] == {"documents": len(texts), "tokens": sum(map(len, wanted))}


def test_datasets_opens_the_store(built):
    """`datasets.load_from_disk` gives a DatasetDict with the same ids as uint16."""
    import datasets

    loaded = datasets.load_from_disk(str(built))
    opened = TokenStore.open(built)
    assert list(loaded) == ["train", "eval"]
    assert loaded["train"].features == datasets.Features({"input_ids": datasets.List(datasets.Value("uint16"))})
    for split in loaded:
        assert loaded[split]["input_ids"][:] == [ids.tolist() for ids in opened.split(split)]


def test_reading_copies_nothing(built):
    """A document is a read-only view whose bytes lie in the mapped file: none are allocated by Arrow or numpy."""
    allocated = pa.total_allocated_bytes()
    documents = TokenStore.open(built).split("train")
    first = documents[0]
    assert np.shares_memory(first, documents[0])
    assert not first.flags.writeable
    assert not first.flags.owndata
    assert pa.total_allocated_bytes() == allocated
    address = first.__array_interface__["data"][0]
    with open("/proc/self/maps") as maps:
        ranges = [line.split() for line in maps if "data-00000.arrow" in line]
    assert any(int(a, 16) <= address < int(b, 16) for a, b in (r[0].split("-") for r in ranges))


def test_documents_pickle_and_fork(built):
    """A pickled copy reads the same, and so does a forked process."""
    documents = TokenStore.open(built).split("eval")
    assert len(pickle.dumps(documents)) < 2000
    assert [ids.tolist() for ids in pickle.loads(pickle.dumps(documents))] == [ids.tolist() for ids in documents]
    code = (
        "import os, sys; from enc.encoder.data.store import TokenStore; "
        f"d = TokenStore.open({str(built)!r}).split('eval'); want = int(sum(x.sum() for x in d)); pid = os.fork()\n"
        "if pid == 0: os._exit(0 if int(sum(x.sum() for x in d)) == want else 1)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_bounds_and_missing_split(built):
    """Indexes outside the split and unknown splits are errors."""
    opened = TokenStore.open(built)
    for index in (-1, len(opened.split("eval"))):
        with pytest.raises(IndexError):
            opened.split("eval")[index]
    with pytest.raises(UsageError, match="no split 'test'; it has train, eval"):
        opened.split("test")


def test_dtype_and_empty_documents(tmp_path):
    """65,536 tokens still fit uint16; documents of no tokens and batches of none survive the format."""
    assert [token_dtype(n).name for n in (1, 65536, 65537)] == ["uint16", "uint16", "uint32"]
    for lengths in ([], [0], [2, 0, 1]):
        ids = np.arange(sum(lengths), dtype=np.uint32)
        message = record_batch_bytes(np.array(lengths, dtype=np.int32), ids)
        assert message.size % 8 == 0
        path = tmp_path / "data.arrow"
        path.write_bytes(bytes(arrow_schema(ids.dtype).serialize()) + bytes(message) + END_OF_STREAM)
        documents = Documents([path], ids.dtype)
        assert documents.lengths.tolist() == [len(row) for row in documents] == lengths
        assert [i for row in documents for i in row] == ids.tolist()


def test_importing_the_store_loads_no_torch():
    """A planner reads a manifest without torch, datasets or transformers."""
    code = (
        "import sys; import enc.encoder.data.store, enc.encoder.data.preprocess; "
        "print(sorted({'torch', 'datasets', 'transformers', 'pandas'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_verify_finds_any_flipped_bit(store_copy):
    """One bit in any file of the store is found, and the file named; opening alone reads sizes only."""
    verify(store_copy)
    for name in read_manifest(store_copy)["files"]:
        path = store_copy / name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
        with pytest.raises(UsageError, match=f"{name} has checksum"):
            verify(store_copy)
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    verify(store_copy)


def test_opening_finds_missing_and_cut_files(store_copy):
    """A file of another size, a missing one and a broken manifest are found when a store is opened."""
    os.truncate(store_copy / "train" / "data-00001.arrow", 100)
    with pytest.raises(UsageError, match=r"data-00001\.arrow has 100 bytes, not"):
        TokenStore.open(store_copy)
    (store_copy / "train" / "data-00001.arrow").unlink()
    with pytest.raises(UsageError, match=r"data-00001\.arrow is missing"):
        TokenStore.open(store_copy)
    manifest = json.loads((store_copy / "manifest.json").read_text())
    for change, message in (
        ("{", "is damaged"),
        ("[]", "of another kind of folder"),
        (json.dumps({"format": "other"}), "of another kind"),
        (json.dumps(manifest | {"version": 99}), "version 99; this enc reads version 1"),
        (json.dumps(manifest | {"splits": {}}), "is damaged: KeyError"),
        (json.dumps(manifest | {"files": {"a": 1}}), "is damaged: TypeError"),
    ):
        (store_copy / "manifest.json").write_text(change)
        with pytest.raises(UsageError, match=message):
            TokenStore.open(store_copy)
    with pytest.raises(UsageError, match=r"is not a token store.*Run `enc preprocess`"):
        TokenStore.open(store_copy / "nowhere")


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("settings", "text_unit", "file", r'settings\.text_unit was "line", asked is "file"'),
        ("settings", "min_text_length", 5, r"settings\.min_text_length was 1, asked is 5"),
        ("settings", "eval_samples", None, r"settings\.eval_samples was 100, asked is null"),
        ("settings", "validation_split", 0.1, r"settings\.validation_split was null, asked is 0\.1"),
        ("settings", "seed", 3, r"settings\.seed was null, asked is 3"),
        ("source", "kind", "hub", r'source\.kind was "files", asked is "hub"'),
        ("source", "location", "/elsewhere", r'source\.location was .*, asked is "/elsewhere"'),
        ("source", "files", {"a.txt": [1, 2]}, r"source files: 1 changed \(a\.txt\)"),
        ("source", "files", {"b.txt": [1, 2], "c.txt": [1, 2]}, r"1 missing \(a\.txt\), 2 new \(b\.txt, …\)"),
        ("tokenizer", "train", {"model": "bpe"}, r'tokenizer\.train was .*, asked is {"model": "bpe"}'),
        ("tokenizer", "name", "bert-base-uncased", r'tokenizer\.name was null, asked is "bert-base-uncased"'),
    ],
)
def test_mismatches_are_named(built, section, key, value, message):
    """Whatever differs from what a store was made from is named with both values, and what to do."""
    manifest = read_manifest(built)
    check_matches(manifest, manifest["request"], built)
    wanted = copy.deepcopy(manifest["request"])
    wanted[section][key] = value
    with pytest.raises(UsageError, match=message) as raised:
        check_matches(manifest, wanted, built)
    assert "Set dataset.pre_tokenize_output to another folder, or delete" in str(raised.value)


def test_the_same_tokenizer_by_another_name_matches(built):
    """A trained tokenizer matches itself when it is later named by its folder, by fingerprint."""
    manifest = read_manifest(built)
    wanted = wanted_request(DatasetConfig(path=str(built)), TokenizerConfig(path=str(built / "tokenizer")), seed=0)
    check_matches(manifest, wanted, built)
    assert set(wanted) == {"tokenizer"}
