"""Sources of text: every kind gives the same documents, splits are what the config says, errors name the place."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from enc.encoder.data.config import DatasetConfig
from enc.encoder.data.sources.documents import read_documents, source_total
from enc.encoder.data.sources.find import resolve_source
from enc.encoder.errors import UsageError

TEXTS = ["The first text.", "Zweiter Text: äöü", "第三の文書", "a fourth, with\ttab", "the fifth"]


def read(seed: int = 0, **settings: object) -> list[tuple[str, str]]:
    config = DatasetConfig.model_validate(settings)
    return [(document.split, document.text) for document in read_documents(resolve_source(config), config, seed)]


def texts(**settings: object) -> list[str]:
    return [text for _, text in read(**settings)]


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(PACK.get(path.suffix.lower(), bytes)(data))
    return str(path)


def json_lines(rows: list[str], column: str = "text") -> str:
    return "".join(json.dumps({column: row, "id": i}) + "\n" for i, row in enumerate(rows))


@pytest.mark.parametrize("suffix", [".txt", ".md", ".rst", ".text", ".txt.gz", ".rst.gz"])
def test_text_files_give_one_document_a_line(tmp_path, suffix):
    """Lines of plain and gzipped text are the documents; blank lines, line ends and the BOM are not."""
    path = write(tmp_path / f"a{suffix}", "\ufeff" + "\r\n".join([TEXTS[0], "", "  \t", *TEXTS[1:]]))
    assert texts(path=path) == TEXTS


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_text_unit_file_keeps_lines_together(tmp_path, suffix):
    """With text_unit file, a file is a document, byte for byte."""
    path = write(tmp_path / f"a{suffix}", "one\n\ntwo\n")
    assert texts(path=path, text_unit="file") == ["one\n\ntwo\n"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz", ".json.gz"])
def test_json_lines(tmp_path, suffix):
    """JSON lines give their text column; null and blank lines give nothing."""
    path = write(tmp_path / f"a{suffix}", json_lines(TEXTS[:3]) + '\n{"text": null}\n' + json_lines(TEXTS[3:]))
    assert texts(path=path) == TEXTS


def test_parquet(tmp_path):
    """Parquet gives its text column, in order, whatever the row groups."""
    pq.write_table(
        pa.table({"n": list(range(1000)), "content": [f"text {i}" for i in range(1000)]}),
        tmp_path / "a.parquet",
        row_group_size=300,
    )
    assert texts(path=str(tmp_path)) == [f"text {i}" for i in range(1000)]


@pytest.fixture
def saved(tmp_path):
    import datasets

    rows = datasets.Dataset.from_dict({"n": list(range(5)), "sentence": TEXTS})
    rows.save_to_disk(tmp_path / "one")
    held = datasets.Dataset.from_dict({"sentence": ["held out", "too"], "n": [1, 2]})
    datasets.DatasetDict({"train": rows, "validation": held}).save_to_disk(tmp_path / "dict")
    datasets.DatasetDict({"a": rows, "b": held}).save_to_disk(tmp_path / "odd")
    return tmp_path


def test_arrow_folders(saved):
    """A save_to_disk folder is read by split, with slices as datasets writes them."""
    assert texts(path=str(saved / "one")) == TEXTS
    assert texts(path=str(saved / "dict")) == TEXTS
    assert read(path=str(saved / "dict"), eval_split="validation", eval_samples=1)[-1:] == [("eval", "held out")]
    assert texts(path=str(saved / "dict"), train_split="train[:40%]") == TEXTS[:2]
    with pytest.raises(UsageError, match="has no split 'train'; it has a, b"):
        texts(path=str(saved / "odd"))
    with pytest.raises(UsageError, match="has no splits"):
        texts(path=str(saved / "one"), eval_split="validation")


def test_folder_and_glob_are_sorted_recursive_and_mixed(tmp_path):
    """A folder is read through, in sorted order, skipping hidden files and other formats; a glob picks from it."""
    for name, content in {
        "b/z.txt": "z",
        "b/a.jsonl": json_lines(["j"]),
        "a.md": "m",
        ".hidden.txt": "h",
        "c.png": "p",
    }.items():
        write(tmp_path / name, content)
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    assert texts(path=str(tmp_path)) == ["m", "j", "z"]
    assert texts(path=str(tmp_path / "**" / "*.txt")) == ["z"]
    assert texts(name=str(tmp_path / "b" / "a.jsonl")) == ["j"]


def test_files_by_split_name(tmp_path):
    """Files belong to the split that a folder or file name carries as a word."""
    for name in ("train-0.txt", "train-1.txt", "validation/a.txt", "trainer.txt"):
        write(tmp_path / name, name)
    got = read(path=str(tmp_path), train_split="train", eval_split="validation")
    assert got == [("train", "train-0.txt"), ("train", "train-1.txt"), ("eval", "validation/a.txt")]
    assert [split for split, _ in read(path=str(tmp_path), eval_split="validation")] == ["train"] * 3 + ["eval"]
    with pytest.raises(UsageError, match="belongs to the split 'test'"):
        read(path=str(tmp_path), eval_split="test")


@pytest.fixture
def hundred(tmp_path):
    return write(tmp_path / "a.txt", "\n".join(f"line {i}" for i in range(100)))


def test_eval_samples_reserves_the_head(hundred, tmp_path):
    """The first documents are held out, and one always stays in train."""
    got = read(path=hundred, eval_samples=30)
    assert [split for split, _ in got] == ["eval"] * 30 + ["train"] * 70
    assert [text for _, text in got] == [f"line {i}" for i in range(100)]
    assert [split for split, _ in read(path=hundred, eval_samples=1000)] == ["eval"] * 99 + ["train"]


def test_validation_split_is_keyed_by_seed_and_document(hundred, tmp_path):
    """The drawn documents depend on the seed and their index alone; every document is in one split."""
    first, again, other = (read(seed, path=hundred, validation_split=0.2) for seed in (1, 1, 2))
    assert first == again != other
    assert [text for _, text in first] == [f"line {i}" for i in range(100)]
    assert 8 <= sum(split == "eval" for split, _ in first) <= 35
    longer = write(tmp_path / "longer.txt", "\n".join(f"line {i}" for i in range(9000)))
    splits = [split for split, _ in read(1, path=longer, validation_split=0.2)]
    assert splits[:100] == [split for split, _ in first]
    assert splits[:4000] != splits[4096:8096]
    assert 1600 < splits.count("eval") < 2000
    assert sum(split == "eval" for split, _ in read(1, path=hundred, validation_split=0.2, eval_samples=3)) == 3


def test_min_text_length_counts_characters(tmp_path):
    """Documents with fewer characters, outer white space aside, are left out."""
    path = write(tmp_path / "a.txt", "äöü\n   ab   \nabcd\n")
    assert texts(path=path, min_text_length=3) == ["äöü", "abcd"]


def test_python_docs_are_many_distinct_and_import_nothing():
    """The built-in source gives thousands of distinct texts, a megabyte and more, and loads no heavy or odd module."""
    code = (
        "import sys; from enc.encoder.data.sources.python_docs import python_docs; found = list(python_docs())\n"
        "print(len(found), len(set(found)), sum(map(len, found)))\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'antigravity', 'tkinter'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    counts, heavy = done.stdout.splitlines()
    count, distinct, characters = map(int, counts.split())
    assert count == distinct > 2000
    assert characters > 10**6
    assert heavy == "[]"


def test_positions_reach_the_total(tmp_path):
    """Positions never fall and end at the total, for plain, gzipped and Parquet files together."""
    for name in ("a.txt", "b.txt.gz", "c.jsonl"):
        write(tmp_path / name, json_lines(TEXTS * 50))
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "d.parquet")
    config = DatasetConfig(path=str(tmp_path))
    source = resolve_source(config)
    positions = [document.position for document in read_documents(source, config, 0)]
    assert positions == sorted(positions)
    assert positions[-1] == source_total(source, config) == sum(f.stat().st_size for f in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "content", "settings", "message"),
    [
        ("a.txt", "words\n".encode("utf-16"), {}, r"a\.txt is UTF-16.*iconv -f UTF-16 -t UTF-8"),
        ("a.txt", "words in two bytes each".encode("utf-16-be"), {"text_unit": "file"}, "is UTF-16.*UTF-16BE"),
        ("a.txt.bz2", bz2.compress(b"x" * 1000)[:-5], {}, "is damaged"),
        ("a.txt.xz", lzma.compress(b"x" * 1000)[:-5], {}, "is damaged"),
        ("a.txt.zst", zstd(b"x" * 1000)[:-3], {}, "is damaged: Truncated"),
        ("a.jsonl.zst", b"plain text", {}, "is damaged"),
        ("a.csv", b"id,body\n1,x\n", {}, r"a\.csv, line 1: no column any of text, .*; it has id, body"),
        ("a.csv", b'id,text\n1,x\n2,"y"z\n', {}, r"a\.csv, line 3: .* expected after"),
        ("a.csv", b'id,text\n1,"never closed\n2,y\n', {}, r"a\.csv, line 3: unexpected end of data"),
        ("a.tsv", b"id\ttext\n1\tx\n2\n", {}, r"a\.tsv, line 3: 1 fields, the header has 2"),
        ("a.txt", b"good\nbad \xff here\n", {}, r"a\.txt is not UTF-8: byte 0xff at offset 9\. "),
        ("a.txt", b"good\nbad \xff here\n", {"text_unit": "file"}, "offset 9"),
        ("a.txt.gz", gzip.compress(b"x" * 100_000, mtime=0)[:-20], {}, "is damaged"),
        ("a.txt.gz", b"no gzip", {}, "is damaged"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', {}, "line 2 is not JSON"),
        ("a.json", b'[{"text": "a"}]', {}, "holds a JSON list, not an object"),
        ("a.jsonl", b'{"body": "a", "id": 1}', {}, "no column any of text, sentence, content; it has body, id"),
        ("a.jsonl", b'{"text": "a"}', {"text_column": "body"}, "no column 'body'; it has text"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}', {}, "line 2: no column 'text'"),
        ("a.jsonl", b'{"text": 7}', {}, "column 'text' holds int"),
        ("a.jsonl", b'{"text": "a\\ud83d"}', {}, "half a surrogate pair at character 1"),
        ("a.parquet", b"PAR1 no", {}, "is not a readable Parquet file"),
        ("a.txt", b" \n\n", {}, "No usable document"),
        ("a.txt", b"abc\n", {"min_text_length": 4}, "min_text_length=4"),
        ("a.html", b"<p>", {}, r"holds no text: it has 1 files \(\.html\)"),
        ("a.txt", b"abc\n", {"validation_split": 1e-6}, "holds out none of the 1 documents"),
        ("a.jsonl", b'{"text": 7}\n', {"on_bad_row": "skip"}, "No usable document"),
        ("a.jsonl", b'7\n{"body": "x"}\n', {"on_bad_row": "skip"}, "line 2: no column any of text"),
    ],
)
def test_bad_text_is_named(tmp_path, name, content, settings, message):
    """Every fault of a source is a UsageError that names the file and the place."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read(path=str(tmp_path), **settings)


def test_missing_sources_are_named(tmp_path, monkeypatch):
    """A path that is not there is an error, never a hub name; nothing at all says what to set."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for settings, message in (
        ({"path": str(tmp_path / "no")}, "dataset.path: .*no does not exist"),
        ({"name": "./no.txt"}, "dataset.name: no.txt does not exist"),
        ({"path": str(tmp_path / "*.txt")}, "matches no file"),
        ({"name": ""}, "are both empty"),
    ):
        with pytest.raises(UsageError, match=message):
            resolve_source(DatasetConfig.model_validate(settings))
    write(tmp_path / "a.bin", "x")
    with pytest.raises(UsageError, match="its name ends in none of"):
        resolve_source(DatasetConfig(path=str(tmp_path / "a.bin")))
    assert resolve_source(DatasetConfig(name="some/dataset")).kind == "hub"


def test_unreachable_hub_is_one_paragraph():
    """An unknown hub name without a network is a UsageError that says what else would work."""
    code = (
        "from enc.encoder.data.config import DatasetConfig; from enc.encoder.data.sources.documents import *\n"
        "from enc.encoder.data.sources.find import *\n"
        "c = DatasetConfig(name='nobody/no-such-set')\n"
        "try: next(read_documents(resolve_source(c), c, 0))\n"
        "except UsageError as e: print(e)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert done.stdout.startswith("Cannot load the dataset 'nobody/no-such-set'"), done
    assert done.stdout.count("\n") == 1


def test_evaluation_and_test_have_sources_of_their_own(tmp_path):
    """`validation_file` and `test_file` are read first, whole, as `path` is; everything in `path` is trained on."""
    train = write(tmp_path / "train" / "a.jsonl", json_lines(TEXTS))
    write(tmp_path / "valid" / "b.jsonl.gz", json_lines(["v 1", "v 2"]))
    write(tmp_path / "valid" / "a.jsonl", json_lines(["v 0"]))
    test = write(tmp_path / "t.txt", "t 0\n\nt 1")
    settings = {"path": train, "validation_file": str(tmp_path / "valid"), "test_file": test}
    held_out = [("eval", "v 0"), ("eval", "v 1"), ("eval", "v 2"), ("test", "t 0"), ("test", "t 1")]
    assert read(**settings) == held_out + [("train", text) for text in TEXTS]
    config = DatasetConfig.model_validate(settings)
    source = resolve_source(config)
    positions = [document.position for document in read_documents(source, config, 0)]
    assert positions == sorted(positions)
    assert positions[-1] == source_total(source, config)
    assert {split for split, _ in read(name="python-docs", test_file=test)} == {"test", "train"}


def test_test_samples_follow_those_of_the_evaluation(hundred):
    """The head is for evaluation, what follows for the test, and one document always stays in train."""
    got = [split for split, _ in read(path=hundred, eval_samples=30, test_samples=20)]
    assert got == ["eval"] * 30 + ["test"] * 20 + ["train"] * 50
    assert [split for split, _ in read(path=hundred, test_samples=1000)] == ["test"] * 99 + ["train"]
    drawn = [split for split, _ in read(1, path=hundred, validation_split=0.2, test_samples=20)]
    assert drawn[:20] == ["test"] * 20
    assert drawn[20:] == [split for split, _ in read(1, path=hundred, validation_split=0.2)][20:]
    with pytest.raises(UsageError, match=r"test_samples=5 holds out none of the 100 documents"):
        read(path=hundred, eval_samples=1000, test_samples=5)


def test_held_out_text_is_not_trained_on(tmp_path):
    """A file of the text to train on is refused as one to test on, unless its split is left out of training."""
    write(tmp_path / "train-0.txt", "one\ntwo")
    held = write(tmp_path / "held.txt", "three")
    with pytest.raises(UsageError, match=r"dataset\.test_file: .*held\.txt is also among the 2 files to train on"):
        read(path=str(tmp_path), test_file=held)
    assert read(path=str(tmp_path), train_split="train", test_file=held)[0] == ("test", "three")


@pytest.mark.parametrize(
    ("key", "content", "message"),
    [
        ("validation_file", None, r"dataset\.validation_file: .*held\.txt does not exist"),
        ("test_file", None, r"dataset\.test_file: .*held\.txt does not exist"),
        ("test_file", "\n \n", r"dataset\.test_file: no usable document in .*held\.txt"),
    ],
)
def test_bad_held_out_sources_are_named(tmp_path, key, content, message):
    """Before anything of the text to train on is read."""
    path = write(tmp_path / "a.txt", "one")
    if content is not None:
        write(tmp_path / "held.txt", content)
    config = DatasetConfig.model_validate({"path": path, key: str(tmp_path / "held.txt")})
    documents = read_documents(resolve_source(config), config, 0)
    with pytest.raises(UsageError, match=message):
        next(documents)


@pytest.mark.parametrize("suffix", [".bz2", ".xz", ".zst", ".GZ"])
def test_packed_files_hold_what_plain_ones_do(tmp_path, suffix):
    """Lines and whole files, also of several packed pieces one after the other."""
    pack = PACK[suffix.lower()]
    path = tmp_path / f"a.JSONL{suffix}"
    path.write_bytes(pack(json_lines(TEXTS[:2]).encode()) + pack(json_lines(TEXTS[2:]).encode()))
    assert texts(path=str(path)) == TEXTS
    whole = write(tmp_path / f"b.txt{suffix.lower()}", "one\n\ntwo\n")
    assert texts(path=whole, text_unit="file") == ["one\n\ntwo\n"]


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t"), (".csv.gz", ",")])
def test_tables_of_text(tmp_path, suffix, delimiter):
    """The header names the columns; fields may be quoted and have delimiters, quotes and line breaks in them."""
    fields = ["plain", f"with{delimiter}it", 'says "so"', "two\nlines", "äöü", "x" * 200_000]
    stream = io.StringIO(newline="")
    csv.writer(stream, delimiter=delimiter).writerows([["id", "content"], *enumerate(fields)])
    path = write(tmp_path / f"a{suffix}", "\ufeff" + stream.getvalue())
    assert texts(path=path) == fields


def hub_folder(root: Path) -> Path:
    """A dataset as it lies on a hub: a card, its JSON, and files of several splits."""
    for split in ("train", "validation", "test"):
        (root / "data").mkdir(parents=True, exist_ok=True)
        table = pa.table({"text": [f"{split} {i}" for i in range(3)]})
        pq.write_table(table, root / "data" / f"{split}-00000-of-00001.parquet")
    write(root / "README.md", "A card, not data.")
    write(root / "dataset_infos.json", "{}")
    return root


def test_a_folder_of_splits_trains_on_train(tmp_path):
    """Text for evaluation and test, and what describes a dataset, are not trained on unless that is asked for."""
    root = str(hub_folder(tmp_path / "hub"))
    train = [f"train {i}" for i in range(3)]
    assert texts(path=root) == train
    assert texts(path=f"{root}/data/*.parquet") == train
    assert texts(path=[f"{root}/data"]) == train
    with_eval = read(path=root, eval_split="validation")
    assert with_eval == [("train", text) for text in train] + [("eval", f"validation {i}") for i in range(3)]
    everything = texts(path=root, train_split="all")
    assert len(everything) == 9
    assert "A card, not data." not in everything
    assert texts(path=f"{root}/data/test*") == [f"test {i}" for i in range(3)]  # asked for by name
    held = read(path=root, validation_file=f"{root}/data/validation-00000-of-00001.parquet")
    assert held == [("eval", f"validation {i}") for i in range(3)] + [("train", text) for text in train]


def test_a_folder_to_evaluate_on_is_read_whole(tmp_path):
    """Its files may be named by splits; all of them are held out."""
    root = str(hub_folder(tmp_path / "hub"))
    own = write(tmp_path / "own.txt", "mine")
    assert len(read(path=own, validation_file=root)) == 9 + 1


@pytest.mark.parametrize(
    ("names", "trained"),
    [
        (("a.txt", "test.txt"), None),
        (("train.txt", "test.txt", "more.txt"), None),
        (("book.txt", "dev/notes.txt"), None),
        (("c4-train.00000-of-00002.txt", "c4-validation.00000-of-00001.txt"), 1),
        (("train.txt", "more.txt"), 2),
        (("test-results.txt", "dev-tools.txt", "unittest.txt", "evaluate/a.txt"), 4),
        (("test.txt", "valid.txt"), 2),
    ],
)
def test_names_of_splits_decide_or_are_asked_about(tmp_path, names, trained):
    """Where names cannot tell what to train on, the ways to say it are named; words alone are no splits."""
    for name in names:
        write(tmp_path / "corpus" / name, name)
    if trained is None:
        with pytest.raises(UsageError, match=r"train_split=all for all of them"):
            read(path=str(tmp_path / "corpus"))
        assert len(texts(path=str(tmp_path / "corpus"), train_split="all")) == len(names)
    else:
        assert len(texts(path=str(tmp_path / "corpus"))) == trained


def test_endings_count_in_any_case_and_other_files_are_named(tmp_path):
    """What a folder has beside what is read is known with its size and the reason."""
    for name in ("a.txt", "B.TXT", "c.JsonL", "page.html", "sub/LICENSE.md", "README.md"):
        write(tmp_path / name, json_lines(["c"]) if name == "c.JsonL" else name)
    source = resolve_source(DatasetConfig(path=str(tmp_path)))
    assert [file.name for file in source.files] == ["B.TXT", "a.txt", "c.JsonL"]
    assert [(file.name, file.size, file.reason) for file in source.left_out] == [
        ("README.md", 9, "about the dataset"),
        ("page.html", 9, "of an ending that is not read"),
        ("sub/LICENSE.md", 14, "about the dataset"),
    ]
    write(tmp_path / "docs" / "README.md", "of text files alone, it is one of them")
    assert texts(path=str(tmp_path / "docs")) == ["of text files alone, it is one of them"]


def test_several_sources_are_read_as_one(tmp_path):
    """Files, folders and globs, in one order whatever theirs is, a file once, each with its own column of the list."""
    first = write(tmp_path / "b" / "x.jsonl", json_lines(["body 1"], column="body"))
    write(tmp_path / "b" / "y.txt", "line")
    (tmp_path / "a").mkdir()
    pq.write_table(pa.table({"body_id": [1], "story": ["parquet 1"]}), tmp_path / "a" / "t.parquet")
    paths = [first, str(tmp_path / "b"), str(tmp_path / "a" / "*.parquet")]
    columns = ["body", "story"]
    expected = ["parquet 1", "body 1", "line"]
    assert texts(path=paths, text_column=columns) == texts(path=paths[::-1], text_column=columns) == expected
    with pytest.raises(UsageError, match=r"no column any of title, body; it has body_id, story"):
        texts(path=paths, text_column=["title", "body"])
    one, single = (resolve_source(DatasetConfig(path=path)) for path in ([paths[1]], paths[1]))
    assert one == single


def test_bad_rows_are_left_out_and_told(tmp_path):
    """With on_bad_row=skip the good rows remain, whatever the format, and each bad one is told with its place."""
    write(
        tmp_path / "a.jsonl",
        b'{"text": "a"}\n{"text": \n{"text": 7}\n{"text": "\\ud83d"}\n[]\n{"x": 1}\n{"text": "b"}\n',
    )
    write(tmp_path / "b.txt", b"c\n\xff\nd\n")
    write(tmp_path / "c.csv", b'text,n\ne,1\nf\n"g"h,2\ni,3\n')
    config = DatasetConfig(path=str(tmp_path), on_bad_row="skip")
    told: list[str] = []
    got = [document.text for document in read_documents(resolve_source(config), config, 0, told.append)]
    assert got == ["a", "b", "c", "d", "e", "i"]
    assert len(told) == 5 + 1 + 2
    assert "a.jsonl, line 2 is not JSON" in told[0]
    with pytest.raises(UsageError, match=r"line 2 is not JSON.*set dataset\.on_bad_row=skip"):
        texts(path=str(tmp_path))


def test_saved_formats_and_empty_tables(saved, tmp_path):
    """A format that a save_to_disk folder remembers is not for us; one without rows is empty, not a fault."""
    import datasets

    rows = datasets.Dataset.from_dict({"text": TEXTS, "ids": [[1]] * len(TEXTS)})
    for name, kind, columns in (("torch", "torch", ["ids"]), ("arrow", "arrow", None), ("pandas", "pandas", None)):
        rows.with_format(kind, columns=columns).save_to_disk(tmp_path / name)
        assert texts(path=str(tmp_path / name)) == TEXTS
    datasets.Dataset.from_dict({"text": []}).save_to_disk(tmp_path / "empty")
    with pytest.raises(UsageError, match="No usable document"):
        texts(path=str(tmp_path / "empty"))


def test_what_cannot_be_looked_at_is_named(tmp_path):
    """Links that lead nowhere or in a circle, names that are not UTF-8 or too long."""
    write(tmp_path / "dead" / "a.txt", "a")
    (tmp_path / "dead" / "b.txt").symlink_to("/nowhere/b.txt")
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop" / "b.txt").symlink_to("b.txt")
    (tmp_path / "name").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path / "name") + b"/caf\xe9.txt")).write_text("x")
    for path, message in (
        ("dead", r"cannot read .*dead/b\.txt: No such file or directory \(it is a link to /nowhere/b\.txt\)"),
        ("loop", r"cannot read .*loop/b\.txt: Too many levels of symbolic links"),
        ("name", r"The name of .*caf\\udce9\.txt is not UTF-8"),
        ("x" * 300, "File name too long"),
    ):
        with pytest.raises(UsageError, match=message):
            resolve_source(DatasetConfig(path=str(tmp_path / path)))
