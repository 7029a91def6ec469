"""Preprocessing: the bytes depend on the request alone, whatever is killed, and nothing is reused silently."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from enc.encoder.data import workers
from enc.encoder.data.chunks import cut_chunks
from enc.encoder.data.config import DatasetConfig, TokenizerConfig, TokenizerTrainConfig
from enc.encoder.data.notes import source_notes, store_notes
from enc.encoder.data.preprocess import _lock, preprocess, reusable, store_path, wanted_request
from enc.encoder.data.sources.source import Document
from enc.encoder.data.store import TokenStore, verify
from enc.encoder.data.tokenizer import EncoderTokenizer
from enc.encoder.data.tokenizer_train import train_tokenizer
from enc.encoder.data.workers import _send, _start_worker
from enc.encoder.errors import RunError, UsageError
from enc.encoder.files import read_json, write_json

# run as its own process; small chunks and data files, so that there are many moments to be killed at
COMMAND = """
import sys
from enc.encoder.data.config import DatasetConfig, TokenizerConfig
from enc.encoder.data import preprocess as module, store
module.FIRST_CHUNK_BYTES, module.CHUNK_BYTES, store.SHARD_BYTES = 2000, 20_000, 60_000
source, tokenizer, output, num_proc = sys.argv[1:]
dataset = DatasetConfig(path=source, eval_samples=700, pre_tokenize_output=output, num_proc=int(num_proc))
report = lambda done, total, tokens: print(done, total, tokens, flush=True)
module.preprocess(dataset, TokenizerConfig(path=tokenizer), 7, report)
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A text of a megabyte, with a few thousand documents, and a tokenizer folder."""
    from pydoc_data.topics import topics

    root = tmp_path_factory.mktemp("inputs")
    lines = [line for name in sorted(topics) for line in topics[name].splitlines()]
    (root / "text.txt").write_text("\n".join(lines * 2), encoding="utf-8")
    section = TokenizerTrainConfig(vocab_size=600)
    train_tokenizer(section, lambda: lines).save(root / "tokenizer")
    return root


def start(inputs: Path, output: Path, num_proc: int = 2) -> "subprocess.Popen[str]":
    words = [sys.executable, "-c", COMMAND, inputs / "text.txt", inputs / "tokenizer", output, num_proc]
    return subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(inputs: Path, output: Path, num_proc: int = 2) -> str:
    process = start(inputs, output, num_proc)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def reference(inputs, tmp_path_factory):
    """The store that one undisturbed process makes with one worker."""
    output = tmp_path_factory.mktemp("reference") / "store"
    run(inputs, output, num_proc=1)
    verify(output)
    return contents(output)


def test_number_of_workers_changes_nothing(inputs, reference, tmp_path):
    """Two workers write the bytes that one writes, and progress ends at the size of the source."""
    process = start(inputs, tmp_path / "store", num_proc=2)
    assert process.stdout is not None
    first = process.stdout.readline()
    assert len(children(process.pid)) == min(2, len(os.sched_getaffinity(0)))
    out = first + process.communicate(timeout=120)[0]
    assert contents(tmp_path / "store") == reference
    done, total, tokens = (list(map(int, column)) for column in zip(*map(str.split, out.splitlines()), strict=True))
    assert tokens == sorted(tokens)
    assert max(done) == total[0] == (inputs / "text.txt").stat().st_size


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_any_moment_it_goes_on(inputs, reference, tmp_path, seed):
    """Killed again and again, main process or worker, it ends with the undisturbed run's bytes; no worker stays."""
    draw, kills, seen = random.Random(seed), 0, 0
    while True:
        process = start(inputs, tmp_path / "store")
        assert process.stdout is not None
        if kills < 5:
            for _ in range(seen + draw.randint(0, 12)):  # let it get a little further than it was
                seen += bool(process.stdout.readline())
            time.sleep(draw.random() * 0.02)
            workers = children(process.pid)
            victim = draw.choice([process.pid, *workers]) if kills % 2 else process.pid
            if process.poll() is None:
                os.kill(victim, signal.SIGKILL)
                kills += 1
        _, err = process.communicate(timeout=60)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL or "RunError: A tokenising process was killed by signal 9" in err
        assert not (tmp_path / "store").exists()
        deadline = time.monotonic() + 5
        while any(map(alive, workers)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not any(map(alive, workers))
    assert kills >= 3
    assert contents(tmp_path / "store") == reference
    assert not (tmp_path / "store.partial").exists()


@pytest.fixture(scope="module")
def killed(inputs, tmp_path_factory):
    """The partial folder that a process killed in the middle left."""
    output = tmp_path_factory.mktemp("killed") / "store"
    process = start(inputs, output)
    assert process.stdout is not None
    for _ in range(15):
        process.stdout.readline()
    process.kill()
    process.communicate()
    return output.with_name("store.partial")


@pytest.mark.parametrize("damage", ["cut log", "cut data", "flipped data", "no log", "extra file"])
def test_goes_on_from_whatever_a_crash_left(inputs, reference, killed, tmp_path, damage):
    """A partial folder whose last writes were lost or garbled, as after a power failure, is cut back and completed."""
    partial = shutil.copytree(killed, tmp_path / "store.partial")
    log, data = partial / "progress.jsonl", partial / "train" / "data-00000.arrow"
    if damage == "cut log":
        os.truncate(log, log.stat().st_size - 30)
    elif damage == "cut data":
        os.truncate(data, data.stat().st_size - 1000)
    elif damage == "flipped data":
        garbled = bytearray(data.read_bytes())
        garbled[-1000] ^= 1
        data.write_bytes(garbled)
    elif damage == "no log":
        log.unlink()
    else:
        (partial / "train" / "data-00009.arrow").write_bytes(b"x")
    run(inputs, tmp_path / "store")
    assert contents(tmp_path / "store") == reference


def sections(inputs, output, **settings):
    settings = {"path": str(inputs / "text.txt"), "pre_tokenize_output": str(output), "num_proc": 1} | settings
    return DatasetConfig.model_validate(settings), TokenizerConfig(path=str(inputs / "tokenizer"))


def test_complete_store_is_reused_only_for_the_same_request(inputs, tmp_path):
    """A second run touches nothing; a changed setting, tokenizer or source is refused and named."""
    dataset, tokenizer = sections(inputs, tmp_path / "store")
    path = preprocess(dataset, tokenizer, seed=0)
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    assert reusable(path, wanted_request(dataset, tokenizer, seed=5))  # nothing is drawn, so the seed does not matter
    assert preprocess(dataset, tokenizer, seed=5) == path
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == before
    with pytest.raises(UsageError, match=r"settings\.min_text_length was 1, asked is 9"):
        preprocess(*sections(inputs, tmp_path / "store", min_text_length=9), seed=0)
    with pytest.raises(UsageError, match=r"tokenizer\.train was null"):
        preprocess(dataset, TokenizerConfig(train=TokenizerTrainConfig()), seed=0)
    copied = shutil.copytree(inputs, tmp_path / "inputs")
    dataset, tokenizer = sections(copied, tmp_path / "second")
    preprocess(dataset, tokenizer, seed=0)
    with (copied / "text.txt").open("a") as file:
        file.write("one more\n")
    with pytest.raises(UsageError, match=r"source files: 1 changed \(text\.txt\)"):
        preprocess(dataset, tokenizer, seed=0)


def test_a_store_as_path_is_taken_as_it_is(inputs, tmp_path):
    """`dataset.path` may be a finished store; then only its tokenizer has to be the asked one."""
    dataset, tokenizer = sections(inputs, tmp_path / "store")
    path = preprocess(dataset, tokenizer, seed=0)
    again = DatasetConfig(path=str(path))
    assert preprocess(again, TokenizerConfig(path=str(path / "tokenizer")), seed=0) == path
    with pytest.raises(UsageError, match=r'tokenizer\.name was null, asked is "bert-base-uncased"'):
        preprocess(again, TokenizerConfig(), seed=0)


def test_interrupted_work_of_another_request_is_not_continued(inputs, tmp_path):
    """A partial folder that was begun with other settings, or from a text that has changed, is refused."""
    process = start(inputs, tmp_path / "store")
    assert process.stdout is not None
    process.stdout.readline()
    process.kill()
    process.communicate()
    difference = r"store\.partial .*settings\.eval_samples was 700, asked is null.*delete"
    with pytest.raises(UsageError, match=difference):
        preprocess(*sections(inputs, tmp_path / "store"), seed=7)


def test_changed_text_is_noticed_where_files_look_the_same(inputs, tmp_path):
    """Work is not continued on another text, even if size and time of the file are what they were."""
    copied = shutil.copytree(inputs, tmp_path / "inputs")
    process = start(copied, tmp_path / "store")
    assert process.stdout is not None
    for _ in range(8):
        process.stdout.readline()
    process.kill()
    process.communicate()
    text = copied / "text.txt"
    before, data = text.stat(), bytearray(text.read_bytes())
    data[1] = ord("Q")
    text.write_bytes(data)
    os.utime(text, ns=(before.st_atime_ns, before.st_mtime_ns))
    again = start(copied, tmp_path / "store")
    assert "UsageError: The text is no longer what it was" in again.communicate(timeout=60)[1]


def test_two_at_once_are_refused(inputs, tmp_path):
    """While one process holds the lock of a store, another is turned away."""
    dataset, tokenizer = sections(inputs, tmp_path / "store")
    with _lock(tmp_path / "store"), pytest.raises(UsageError, match="Another preprocess is writing"):
        preprocess(dataset, tokenizer, seed=0)
    assert preprocess(dataset, tokenizer, seed=0).is_dir()


def test_full_disk_leaves_no_store_and_can_go_on(inputs, tmp_path):
    """A write that fails for lack of room is one paragraph; the final name does not exist; a later run completes it."""
    dataset, tokenizer = sections(inputs, tmp_path / "store")
    code = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
from enc.encoder.data.config import DatasetConfig, TokenizerConfig
from enc.encoder.data.preprocess import preprocess
from enc.encoder.errors import RunError
dataset = DatasetConfig.model_validate_json({dataset.model_dump_json()!r})
try: preprocess(dataset, TokenizerConfig(path={tokenizer.path!r}), 0)
except RunError as error: print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "store failed: File too large. What was done is kept in" in done.stdout
    assert done.stdout.count("\n") == 1
    assert not (tmp_path / "store").exists()
    verify(preprocess(dataset, tokenizer, seed=0))


def test_unwritable_targets_are_named(inputs, tmp_path):
    """A target below a file, or one that is some other folder, is an error before any work."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match=r"Cannot write the token store .*Set dataset\.pre_tokenize_output"):
        preprocess(*sections(inputs, tmp_path / "file" / "store"), seed=0)
    with pytest.raises(UsageError, match="is not a token store"):
        preprocess(*sections(inputs, inputs), seed=0)


def test_bad_text_leaves_nothing_behind(inputs, tmp_path):
    """An error in the source before anything was written leaves no partial folder, and no worker."""
    (tmp_path / "bad.txt").write_bytes(b"fine\n\xff\n")
    before = children(os.getpid())  # what the other tests of this process keep
    with pytest.raises(UsageError, match=r"bad\.txt is not UTF-8"):
        preprocess(*sections(inputs, tmp_path / "store", path=str(tmp_path / "bad.txt")), seed=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.txt"]
    assert children(os.getpid()) == before


def test_text_without_tokens_is_left_out(inputs, tmp_path):
    """Documents of control characters alone make no row; if all are such, that is an error."""
    (tmp_path / "a.txt").write_text("\x01\x02\nsome words\n\x03\n")
    path = preprocess(*sections(inputs, tmp_path / "store", path=str(tmp_path / "a.txt")), seed=0)
    assert TokenStore.open(path).split("train").lengths.size == 1
    (tmp_path / "b.txt").write_text("\x01\x02\n")
    with pytest.raises(UsageError, match="makes no tokens"):
        preprocess(*sections(inputs, tmp_path / "other", path=str(tmp_path / "b.txt")), seed=0)


def test_worker_ends_with_its_parent_in_the_middle_of_a_text(inputs):
    """A worker that is busy for long with one text ends as soon as the other end of its pipe closes."""
    worker = _start_worker(inputs / "tokenizer")
    assert worker.stdin is not None
    assert worker.stdout is not None
    _send(worker.stdin, [" ".join(map(str, range(2_000_000))).encode()])
    time.sleep(0.5)
    assert worker.poll() is None
    worker.stdin.close()
    assert worker.wait(timeout=15) == 1
    worker.stdout.close()


def test_worker_that_dies_is_reported(inputs, tmp_path, monkeypatch):
    """A worker that ends at once, however often, is a RunError and not a hang."""
    real = subprocess.Popen
    monkeypatch.setattr(workers.subprocess, "Popen", lambda command, **k: real([sys.executable, "-c", "exit(9)"], **k))
    with pytest.raises(RunError, match="ended with code 9"):
        preprocess(*sections(inputs, tmp_path / "store", num_proc=2), seed=0)


def test_trained_tokenizer_is_stored_and_not_retrained(inputs, tmp_path):
    """A tokenizer trained on the way lies in the store and made its ids."""
    dataset, _ = sections(inputs, tmp_path / "store")
    tokenizer = TokenizerConfig(train=TokenizerTrainConfig(model="bpe", vocab_size=500))
    opened = TokenStore.open(preprocess(dataset, tokenizer, seed=0))
    loaded = EncoderTokenizer.load(opened.tokenizer_dir)
    assert loaded.num_tokens == opened.manifest["tokenizer"]["num_tokens"] == 500
    assert loaded.fingerprint() == opened.manifest["tokenizer"]["fingerprint"]
    assert loaded.name == "bpe-500"
    first = (inputs / "text.txt").read_text().split("\n", 1)[0]
    assert loaded.tokenizer.decode(opened.split("train")[0].tolist()) == first


def test_chunks_keep_order_and_size():
    """Chunks grow from the first size to the full one, hold one split each, and lose nothing."""
    documents = [Document("eval" if i % 10 == 0 else "train", f"{i:05d}" * 20, i) for i in range(2000)]
    chunks = list(cut_chunks(documents, 500, 4000))
    for split in ("train", "eval"):
        joined = [text.decode() for chunk in chunks if chunk.split == split for text in chunk.texts]
        assert joined == [text for s, text, _ in documents if s == split]
    assert chunks[0].num_bytes == 500
    assert max(chunk.num_bytes for chunk in chunks) == 4000


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"name": "python-docs"}, "tokenized_data/python-docs"),
        ({"name": "org/set", "config": "en"}, "tokenized_data/org-set-en"),
        ({"path": "my texts/"}, "tokenized_data/my-texts"),
        ({"path": "/data/my texts/"}, "tokenized_data/data-my-texts"),
        ({"path": "A/train"}, "tokenized_data/A-train"),
        ({"path": "B/./train"}, "tokenized_data/B-train"),
        ({"path": "a/*.txt"}, "tokenized_data/a-.txt"),
        ({"path": ["a/x", "b.txt"]}, "tokenized_data/a-x+b.txt"),
        ({"path": "a.txt", "pre_tokenize_output": "out/x"}, "out/x"),
    ],
)
def test_store_path(settings, wanted):
    """The store's place is a function of the config."""
    assert store_path(DatasetConfig.model_validate(settings)) == Path(wanted)


def test_memory_does_not_grow_with_the_corpus(inputs, tmp_path):
    """Ten times the text needs hardly more memory in the main process."""
    code = COMMAND.replace("2000, 20_000, 60_000", "20_000, 100_000, 10**9") + "\nimport resource"
    code += "\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    peaks = []
    for times in (1, 10):
        folder = tmp_path / str(times)
        folder.mkdir()
        for copy in range(times):
            shutil.copy(inputs / "text.txt", folder / f"{copy}.txt")
        words = [sys.executable, "-c", code, folder, inputs / "tokenizer", folder / "store", 2]
        done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    assert peaks[1] - peaks[0] < 8, peaks  # MB, of 9 MB more text


def test_sources_of_the_evaluation_and_the_test_belong_to_the_request(inputs, tmp_path):
    """A changed, other or missing source of a held-out split is refused and named; the finished store knows them."""
    for name in ("valid", "test"):
        (tmp_path / f"{name}.txt").write_text(f"some {name} words\nand more\n")
    held_out = {"validation_file": str(tmp_path / "valid.txt"), "test_file": str(tmp_path / "test.txt")}
    dataset, tokenizer = sections(inputs, tmp_path / "store", **held_out)
    path = preprocess(dataset, tokenizer, seed=0)
    assert TokenStore.open(path).splits == ("train", "eval", "test")
    assert [len(TokenStore.open(path).split(split)) for split in ("eval", "test")] == [2, 2]
    assert preprocess(dataset, tokenizer, seed=0) == path
    with pytest.raises(UsageError, match=r"test_file was /.*, asked is none"):
        preprocess(dataset.model_copy(update={"test_file": None}), tokenizer, seed=0)
    ready = DatasetConfig(path=str(path), validation_file=held_out["validation_file"])
    assert preprocess(ready, tokenizer, seed=0) == path
    with (tmp_path / "valid.txt").open("a") as file:
        file.write("one more\n")
    for changed in (dataset, ready):
        with pytest.raises(UsageError, match=r"validation_file files: 1 changed \(valid\.txt\)"):
            preprocess(changed, tokenizer, seed=0)
    with pytest.raises(UsageError, match=r"test_file was none, asked is"):
        preprocess(*sections(inputs, preprocess(*sections(inputs, tmp_path / "b"), seed=0),
                             test_file=held_out["test_file"]), seed=0)  # fmt: skip


def test_killed_with_held_out_sources_it_goes_on(inputs, tmp_path):
    """The same bytes as undisturbed, also when it was killed among the held-out documents."""
    text = (inputs / "text.txt").read_text()
    for name in ("valid", "test"):
        (tmp_path / f"{name}.txt").write_text(text[:60_000])
    extra = f'validation_file="{tmp_path}/valid.txt", test_file="{tmp_path}/test.txt"'
    command = COMMAND.replace("eval_samples=700", extra)

    def start_here(name: str) -> "subprocess.Popen[str]":
        words = [sys.executable, "-c", command, inputs / "text.txt", inputs / "tokenizer", tmp_path / name, 2]
        return subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    start_here("whole").communicate(timeout=120)
    assert (tmp_path / "whole").exists()
    for num_lines in (3, 25):
        process = start_here("killed")
        assert process.stdout is not None
        for _ in range(num_lines):
            process.stdout.readline()
        process.kill()
        process.communicate()
        assert (tmp_path / "killed.partial").exists()
    _, err = start_here("killed").communicate(timeout=120)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole"), err


def test_newer_or_moved_files_of_the_same_bytes_are_the_same_text(inputs, tmp_path):
    """A checkout or a copy has other times and another place; what counts is what is in the files."""
    copied = shutil.copytree(inputs, tmp_path / "inputs")
    dataset, tokenizer = sections(copied, tmp_path / "store")
    path = preprocess(dataset, tokenizer, seed=0)
    os.utime(copied / "text.txt", ns=(1, 1))
    assert preprocess(dataset, tokenizer, seed=0) == path
    copied.rename(tmp_path / "elsewhere")
    moved, tokenizer = sections(tmp_path / "elsewhere", tmp_path / "store")
    assert preprocess(moved, tokenizer, seed=0) == path
    data = bytearray((tmp_path / "elsewhere" / "text.txt").read_bytes())
    data[1] = ord("Q")
    (tmp_path / "elsewhere" / "text.txt").write_bytes(data)
    with pytest.raises(UsageError, match=r"source files: 1 changed \(text\.txt\)"):
        preprocess(moved, tokenizer, seed=0)


def test_work_goes_on_after_a_bad_line_was_mended(inputs, reference, tmp_path):
    """What was tokenised before the line stays, for its text is the same; so it is with rows that are left out."""
    text = (inputs / "text.txt").read_bytes()
    (tmp_path / "text.txt").write_bytes(text + b"\n\xff")
    (tmp_path / "tokenizer").symlink_to(inputs / "tokenizer")
    _, err = start(tmp_path, tmp_path / "store").communicate(timeout=60)
    assert "is not UTF-8" in err
    log = (tmp_path / "store.partial" / "progress.jsonl").read_text()
    (tmp_path / "text.txt").write_bytes(text)
    first = run(tmp_path, tmp_path / "store").splitlines()
    assert len(log.splitlines()) > 5
    before, after = reference, contents(tmp_path / "store")
    assert {name: data for name, data in after.items() if "/data-" in name} == {
        name: data for name, data in before.items() if "/data-" in name
    }
    assert len({line.split()[2] for line in first[: len(log.splitlines())]}) == 1  # these were not tokenised again


def test_rows_that_are_left_out_are_counted_in_the_store(inputs, tmp_path):
    """With the reason of the first; without such rows nothing is said."""
    (tmp_path / "a.jsonl").write_text('{"text": "good words"}\n{"text": 7}\n{"text": "more words"}\nnothing\n')
    dataset, tokenizer = sections(inputs, tmp_path / "store", path=str(tmp_path / "a.jsonl"), on_bad_row="skip")
    opened = TokenStore.open(preprocess(dataset, tokenizer, seed=0))
    assert opened.manifest["bad_rows"]["number"] == 2
    assert "line 2: column 'text' holds int" in opened.manifest["bad_rows"]["first"]
    assert opened.manifest["splits"]["train"]["documents"] == 2
    assert [note for note in store_notes(opened.manifest) if "2 rows that cannot be read" in note]
    (tmp_path / "b.txt").write_text("good words\n")
    fine, _ = sections(inputs, tmp_path / "fine", path=str(tmp_path / "b.txt"))
    assert not list(store_notes(TokenStore.open(preprocess(fine, tokenizer, seed=0)).manifest))


def test_unknown_text_is_counted_and_warned_of(inputs, tmp_path):
    """By tokens, and by documents of which nothing is known; characters are counted too."""
    rows = ["known words here", "第三の文書", "ก" * 150, "more words"]
    (tmp_path / "a.txt").write_text("\n".join(rows))
    opened = TokenStore.open(preprocess(*sections(inputs, tmp_path / "store", path=str(tmp_path / "a.txt")), seed=0))
    unknown = EncoderTokenizer.load(opened.tokenizer_dir).unknown_id
    ids = [row.tolist() for row in opened.split("train")]
    assert opened.manifest["statistics"]["train"] == {
        "characters": sum(map(len, rows)),
        "unknown_tokens": sum(row.count(unknown) for row in ids),
        "unknown_documents": sum(set(row) == {unknown} for row in ids),
    }
    (note,) = store_notes(opened.manifest)
    assert "no token of 50.0% of its documents" in note
    assert "tokenizer.train.model=bpe" in note


def test_what_was_read_and_left_out_is_in_the_store(inputs, tmp_path):
    """Files and bytes by ending, and those that were not read by reason."""
    for name in ("train.txt", "test.txt", "page.html", "notes.HTML"):
        (tmp_path / "corpus" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "corpus" / name).write_text("words\n")
    dataset, tokenizer = sections(inputs, tmp_path / "store", path=str(tmp_path / "corpus"))
    opened = TokenStore.open(preprocess(dataset, tokenizer, seed=0))
    assert opened.manifest["sources"] == {
        "read": {".txt": {"files": 1, "bytes": 6, "first": "train.txt"}},
        "left_out": {
            "of another split": {"files": 1, "bytes": 6, "first": "test.txt"},
            "of an ending that is not read": {"files": 2, "bytes": 12, "first": "notes.HTML"},
        },
    }
    assert list(source_notes(opened.manifest["sources"])) == [
        "Text of 1 file, 6 bytes: 1 .txt.",
        "Left out: 1 file, 6 bytes of another split (test.txt); 2 files, 12 bytes of an ending that is not read "
        "(notes.HTML, …).",
    ]


def test_an_older_store_of_all_splits_is_not_taken_for_one_of_train(inputs, tmp_path):
    """A store that was made when names of splits were not looked at has the text of the test in it."""
    for name in ("train.txt", "test.txt"):
        (tmp_path / name).write_text("words\n")
    dataset, tokenizer = sections(inputs, tmp_path / "store", path=str(tmp_path / "t*.txt"))
    path = preprocess(dataset, tokenizer, seed=0)
    manifest = read_json(path / "manifest.json")
    assert manifest["request"]["settings"]["train_split"] == "train"
    manifest["request"]["settings"]["train_split"] = None
    write_json(path / "manifest.json", manifest)
    with pytest.raises(UsageError, match=r'settings\.train_split was null, asked is "train"'):
        preprocess(dataset, tokenizer, seed=0)


def test_a_store_under_its_older_default_name_is_found(inputs, tmp_path, monkeypatch):
    """Stores used to be named by the last part of a path alone; one of another text is not taken for this one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "corpus").mkdir(parents=True)
    shutil.copy(inputs / "text.txt", tmp_path / "a" / "corpus")
    dataset, tokenizer = sections(inputs, Path("tokenized_data/corpus"), path="a/corpus")
    preprocess(dataset, tokenizer, seed=0)
    assert store_path(DatasetConfig(path="a/corpus")) == Path("tokenized_data/corpus")
    assert store_path(DatasetConfig(path="b/corpus")) == Path("tokenized_data/b-corpus")


def test_ids_of_another_tool_become_a_store(inputs, tmp_path):
    """A folder of `datasets` with input_ids gives the tokens that its text gives, whatever stands around them."""
    import datasets

    lines = (inputs / "text.txt").read_text().splitlines()[:60]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    of_text, tokenizer = sections(inputs, tmp_path / "of_text", path=str(tmp_path / "text.txt"), eval_samples=5)
    wanted = TokenStore.open(preprocess(of_text, tokenizer, seed=0))
    own = EncoderTokenizer.load(inputs / "tokenizer")
    rows = [own.tokenizer.encode(line).ids for line in lines if line.strip()]
    padded = [row + [own.pad_id] * (200 - len(row)) if i % 2 else row for i, row in enumerate(rows)]
    table = datasets.Dataset.from_dict({"input_ids": padded, "attention_mask": [[1] * len(row) for row in padded]})
    table.save_to_disk(tmp_path / "ids")
    of_ids, _ = sections(inputs, tmp_path / "of_ids", path=str(tmp_path / "ids"), eval_samples=5)
    made = TokenStore.open(preprocess(of_ids, tokenizer, seed=0))
    assert made.manifest["splits"] == wanted.manifest["splits"]
    for split in ("train", "eval"):
        assert [ids.tolist() for ids in made.split(split)] == [ids.tolist() for ids in wanted.split(split)]
    assert made.fingerprint == wanted.fingerprint


def test_ids_of_another_tokenizer_are_refused(inputs, tmp_path):
    """Ids that the tokenizer does not have, lists of something else, and training a tokenizer on ids."""
    import datasets

    for name, rows in (("large", [[5, 6], [5, 70_000]]), ("negative", [[-100, 5]]), ("words", [["a"]])):
        datasets.Dataset.from_dict({"input_ids": rows}).save_to_disk(tmp_path / name)
    for name, message in (
        ("large", "holds the id 70000, but the tokenizer .* has 600 tokens"),
        ("negative", "holds the id -100"),
        ("words", "column 'input_ids' is no list of whole numbers"),
        ("words", "leave dataset.min_text_length at 1"),
    ):
        settings = {"min_text_length": 5} if "min_text" in message else {}
        with pytest.raises(UsageError, match=message):
            preprocess(*sections(inputs, tmp_path / "store", path=str(tmp_path / name), **settings), seed=0)
        assert not (tmp_path / "store.partial").exists()
    dataset, _ = sections(inputs, tmp_path / "store", path=str(tmp_path / "large"))
    with pytest.raises(UsageError, match="which no tokenizer can be trained on"):
        preprocess(dataset, TokenizerConfig(train=TokenizerTrainConfig()), seed=0)
