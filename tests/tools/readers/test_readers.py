"""Readers of checkpoint formats: the true tensors come out of files that the systems themselves wrote."""

import json
import pickle
import re
import shutil
import struct
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from foreign import ACCELERATE, CASES, RunsCode, hostile_pickle, hostile_torch_file
from safetensors.torch import load_file, save_file

from enc.encoder.errors import DamagedError, UsageError
from enc.tools.readers.detect import open_source
from enc.tools.readers.source import Source, check_covered
from enc.tools.verify import verify_foreign

MOMENTS = ("exp_avg", "exp_avg_sq")


def assert_equal(source: Source, expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in expected.items():
        stored = source.tensors[name]
        assert stored.spec.shape == tuple(tensor.shape)
        assert torch.equal(stored.read(), tensor), name


@pytest.mark.parametrize("case", CASES)
def test_deepspeed_folders_give_the_true_state(foreign: Path, case: str) -> None:
    """Master weights and moments of every ZeRO stage equal those gathered in the run, padding or not."""
    source = open_source(foreign / case)
    expected = load_file(foreign / f"{case}.safetensors")
    assert_equal(source, expected)
    assert source.weights.keys() == {name for name in expected if not name.startswith(MOMENTS)} | {
        "offset",
        "head.weight",
    }
    assert torch.equal(source.weights["head.weight"].read(), expected["embedding.weight"])
    assert torch.equal(source.weights["offset"].read(), torch.arange(5.0))
    assert source.counters["step"] == source.counters["optimizer_steps"] == 3
    assert source.counters["zero_stage"] == int(case[1])
    named = {name for name in source.moments if "#" not in name}
    assert named == ({name for name in expected if name.startswith(MOMENTS)} if case[1] != "0" else set())


def test_the_folder_below_latest_can_be_named_too(foreign: Path) -> None:
    whole, below = open_source(foreign / "z2-bf16"), open_source(foreign / "z2-bf16" / "global_step3")
    assert whole.weights.keys() == below.weights.keys()


def test_deepspeed_folders_of_trainer_and_accelerate(foreign: Path) -> None:
    """Written by Trainer itself at stage 3, and under the tag that Accelerate gives."""
    source = open_source(foreign / "trainer" / "checkpoint-3")
    expected = load_file(foreign / "trainer.safetensors")
    assert_equal(source, expected)
    assert set(source.moments) == {name for name in expected if name.startswith(MOMENTS)}
    assert_equal(open_source(foreign / "accelerate"), load_file(foreign / "z3-bf16.safetensors"))


def test_dcp_folders_give_the_true_state(foreign: Path) -> None:
    """Shards of two FSDP2 ranks are joined; `model.` and `optim.state.` are dropped from names."""
    expected = load_file(foreign / "fsdp.safetensors")
    source = open_source(foreign / "fsdp")
    assert_equal(source, expected)
    assert len(source.moments) == 12
    assert source.counters["optimizer_steps"] == 3
    weights = {name: t for name, t in expected.items() if not name.startswith(MOMENTS) and name != "head.weight"}
    assert_equal(open_source(foreign / "fsdp-hf"), weights)


def test_accelerate_folders_number_their_moments() -> None:
    source = open_source(ACCELERATE / "checkpoints" / "10")
    assert_equal(source, load_file(ACCELERATE / "checkpoints" / "10" / "model.safetensors"))
    state = torch.load(ACCELERATE / "checkpoints" / "10" / "optimizer.bin", weights_only=True)["state"]
    assert_equal(source, {f"{kind}.#{n}": entry[kind] for n, entry in state.items() for kind in MOMENTS})
    assert (source.counters["step"], source.counters["tokens"], source.counters["optimizer_steps"]) == (10, 5214, 10)


WEIGHTS = {
    "a.weight": torch.randn(7, 5),
    "b.weight": torch.randn(3, 4).bfloat16(),
    "c.turned": torch.randn(4, 6).t(),
    "d.part": torch.arange(20).view(4, 5)[1:3, 1:4],
    "e.empty": torch.empty(0, 3),
    "f.scalar": torch.tensor(3.5),
}


def _one_safetensors(folder: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in WEIGHTS.items()}, folder / "w.safetensors")
    return folder / "w.safetensors"


def _torch_file(folder: Path) -> Path:
    torch.save({"state_dict": WEIGHTS, "epoch": 3}, folder / "w.pt")
    return folder / "w.pt"


def _sharded(folder: Path, stem: str, write: Callable[[dict[str, torch.Tensor], Path], object]) -> Path:
    name, suffix = stem.split(".")
    files = [f"{name}-0000{n}-of-00002.{suffix}" for n in (1, 2)]
    place = {tensor: files[number % 2] for number, tensor in enumerate(WEIGHTS)}
    for file in files:
        write({tensor: WEIGHTS[tensor].contiguous() for tensor in WEIGHTS if place[tensor] == file}, folder / file)
    (folder / f"{stem}.index.json").write_text(f'{{"weight_map": {str(place)!s}}}'.replace("'", '"'))
    return folder


FILES = {
    "safetensors file": _one_safetensors,
    "torch file": _torch_file,
    "sharded safetensors": lambda folder: _sharded(folder, "model.safetensors", save_file),
    "sharded bin": lambda folder: _sharded(folder, "pytorch_model.bin", torch.save),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_of_weights(tmp_path: Path, kind: str) -> None:
    """Any dtype and layout: transposed, a part of a larger tensor, empty, a scalar."""
    source = open_source(FILES[kind](tmp_path))
    assert source.weights.keys() == WEIGHTS.keys()
    assert_equal(source, WEIGHTS)


# --- damage ----------------------------------------------------------------------------------------------------------


def _drop(name: str) -> Callable[[Path], None]:
    return lambda folder: next(folder.rglob(name)).unlink()


def _cut(name: str) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        path = next(folder.rglob(name))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return cut


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "checkpoint10.pt"])
def test_a_pointer_of_git_lfs_is_called_one(name: str, tmp_path: Path) -> None:
    """It is not damaged: its file was never fetched."""
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 132416\n")
    with pytest.raises(DamagedError, match="git lfs pull"):
        open_source(tmp_path / name)


DAMAGES = [
    ("z3-fp32", _drop("*rank_1*optim*"), "optimizer states of rank 1 of 2 are missing"),
    ("z2-bf16", _drop("*rank_0*optim*"), "optimizer states of rank 0 of 2 are missing"),
    ("z1-fp32", _drop("mp_rank_00*"), "latest|incomplete|model states"),
    ("z3-fp32", _cut("*rank_1*optim*"), "rank_1.*is damaged"),
    ("z2-fp32", _cut("mp_rank_00*"), "mp_rank_00.*is damaged"),
    ("fsdp", _drop("__1_0.distcp"), "__1_0.distcp of 2 data files missing"),
    ("fsdp", _cut(".metadata"), "metadata is damaged"),
    ("fsdp", _cut("__0_0.distcp"), "__0_0.distcp is damaged"),
    ("fsdp-hf", _cut("*.safetensors"), "is damaged"),
]


@pytest.mark.parametrize(("case", "damage", "message"), DAMAGES)
def test_damaged_and_missing_shards_are_named(
    foreign: Path, tmp_path: Path, case: str, damage: Callable[[Path], None], message: str
) -> None:
    """One sentence names what is missing; no tensor is given that is not whole."""
    folder = shutil.copytree(foreign / case, tmp_path / case)
    damage(folder)
    status, checked = verify_foreign(folder)
    assert (status.state, checked) == ("damaged", [])
    assert re.search(message, status.problems[0])


def test_a_changed_byte_of_a_torch_file_is_found(foreign: Path, tmp_path: Path) -> None:
    """The CRC32 that torch writes is compared."""
    folder = shutil.copytree(foreign / "z3-bf16", tmp_path / "z3")
    assert verify_foreign(folder)[0].state == "complete"
    path = next(folder.rglob("*rank_1*optim*"))
    extent = open_source(folder).weights["first.weight"].extents[1]
    data = bytearray(path.read_bytes())
    data[extent.start] ^= 1
    path.write_bytes(data)
    status, _ = verify_foreign(folder)
    assert status.state == "damaged"
    assert re.search(f"{path.name}.*does not match its CRC32", status.problems[0])
    data[30] = 0xFF  # of the name of the first record
    path.write_bytes(data)
    assert "records cannot be read" in verify_foreign(folder)[0].problems[0]


def test_nothing_readable(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    for path in (tmp_path, tmp_path / "notes.txt", tmp_path / "nothere"):
        with pytest.raises(UsageError):
            open_source(path)


# --- odd files -------------------------------------------------------------------------------------------------------


def _safetensors(path: Path, header: object, num_bytes: int = 8) -> Path:
    """Write a safetensors file with any header, of which text and bytes are taken as they are."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(num_bytes))
    return path


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HEADERS = {
    "sharding info that is no JSON": ({"__metadata__": {"DCP_SHARDING_INFO": "{"}, "a": ENTRY}, "DCP_SHARDING_INFO"),
    "sharding info without offsets": (
        {"__metadata__": {"DCP_SHARDING_INFO": '{"a": {}}'}, "a": ENTRY},
        "DCP_SHARDING_INFO",
    ),
    "sharding info of other dimensions": (
        {"__metadata__": {"DCP_SHARDING_INFO": '{"a": {"saved_offsets": [0, 0]}}'}, "a": ENTRY},
        "does not fit a",
    ),
    "metadata that is a list": ({"__metadata__": [1], "a": ENTRY}, "__metadata__"),
    "a shape of fractions": ({"a": {**ENTRY, "shape": [2.0]}}, "whole numbers"),
    "a huge shape of nothing": ({"a": {**ENTRY, "shape": [0, 2**70], "data_offsets": [0, 0]}}, "is damaged"),
    "deep JSON": (b"[" * 200_000, "recursion"),
    "half of a surrogate pair": (b'{"\\ud800":' + json.dumps(ENTRY).encode() + b"}", "surrogates"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_no_library_writes_are_damage(tmp_path: Path, case: str) -> None:
    header, message = HEADERS[case]
    with pytest.raises(DamagedError, match=message):
        open_source(_safetensors(tmp_path / "w.safetensors", header))


def test_boxes_that_overlap_are_refused(tmp_path: Path) -> None:
    """Their elements add up, yet some would be left out: memory that nobody wrote would be given as weights."""
    for number in (1, 2):
        metadata = {"DCP_SHARDING_INFO": json.dumps({"a": {"saved_offsets": [2]}})}
        _safetensors(tmp_path / f"{number}.safetensors", {"__metadata__": metadata, "a": ENTRY})
    with pytest.raises(DamagedError, match="parts of a overlap"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("shape", "boxes", "message"),
    [
        ((4, 4), [((0, 0), (4, 2)), ((0, 2), (4, 2))], None),
        ((4, 4), [((0, 0), (2, 4)), ((2, 0), (2, 2)), ((2, 2), (2, 2)), ((4, 4), (0, 0))], None),
        ((), [((), ())], None),
        ((4, 4), [((0, 0), (4, 2)), ((0, 1), (4, 2))], "overlap"),
        ((4, 4), [((0, 0), (2, 4))], "incomplete"),
        ((4, 4), [((0, 0), (4, 2)), ((0, 3), (4, 2))], "outside"),
        ((4, 4), [((-1, 0), (4, 4))], "outside"),
        ((4, 4), [((0,), (16,))], "outside"),
        ((), [((), ()), ((), ())], "overlap"),
    ],
)
def test_boxes_cover_a_tensor_once(
    shape: tuple[int, ...], boxes: list[tuple[tuple[int, ...], tuple[int, ...]]], message: str | None
) -> None:
    with pytest.raises(DamagedError, match=message) if message else nullcontext():
        check_covered("w", shape, boxes, Path("folder"))


def test_torch_files_without_plain_bytes_are_refused(tmp_path: Path) -> None:
    """Compressed archives, tensors of the meta device and lazy views hold no values at their places."""
    torch.save({"a": torch.arange(1000.0)}, tmp_path / "plain.pt")
    plain = zipfile.ZipFile(tmp_path / "plain.pt")
    with plain, zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    torch.save({"m": torch.empty(3, device="meta")}, tmp_path / "meta.pt")
    torch.save({"c": torch.ones(3, dtype=torch.complex64).conj()}, tmp_path / "conjugated.pt")
    deep: dict[str, object] = {}
    deep["again"] = deep
    torch.save(deep, tmp_path / "deep.pt")
    (tmp_path / "empty.pt").touch()
    (tmp_path / "text.pt").write_text("a text")
    messages = {"packed": "compressed", "meta": "meta device", "conjugated": "conjugated", "deep": "too deep",
                "empty": "is empty", "text": "does not begin"}  # fmt: skip
    for name, message in messages.items():
        with pytest.raises(UsageError, match=message):
            open_source(tmp_path / f"{name}.pt")


@pytest.mark.parametrize("text", ["[]", '{"step": "x"}', '{"step": null}', '{"step": NaN}', "[" * 100_000])
def test_counters_that_are_none_are_damage(tmp_path: Path, text: str) -> None:
    (tmp_path / "state").mkdir()
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "trainer_state.json").write_text(text)
    with pytest.raises(DamagedError, match=r"trainer_state\.json"):
        open_source(tmp_path)


# --- hostile files ---------------------------------------------------------------------------------------------------


class _InMetadata:
    def __init__(self, folder: Path) -> None:
        self.metadata = RunsCode(folder)


HOSTILE = {
    "a torch file": (lambda folder, marker: hostile_torch_file(folder / "w.pt", marker), "w.pt"),
    "a plain pickle": (lambda folder, marker: hostile_pickle(folder / "w.bin", marker), "w.bin"),
    "model states": (lambda folder, marker: hostile_torch_file(folder / "mp_rank_00_model_states.pt", marker), ""),
    "DCP metadata": (lambda folder, marker: hostile_pickle(folder / ".metadata", marker), ""),
    "a bin folder": (lambda folder, marker: hostile_torch_file(folder / "pytorch_model.bin", marker), ""),
    "an optimizer file": (
        lambda folder, marker: (
            save_file({"w": torch.ones(2)}, folder / "model.safetensors"),
            hostile_torch_file(folder / "optimizer.bin", marker),
        ),
        "",
    ),
    "counters": (
        lambda folder, marker: (
            save_file({"w": torch.ones(2)}, folder / "model.safetensors"),
            hostile_torch_file(folder / "custom_checkpoint_0.pkl", marker),
        ),
        "",
    ),
    "a universal folder": (
        lambda folder, marker: (
            (folder / "zero" / "w").mkdir(parents=True),
            hostile_torch_file(folder / "zero" / "w" / "fp32.pt", marker),
        ),
        "",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_pickles_are_refused_and_not_run(tmp_path: Path, kind: str) -> None:
    """Whatever file holds it, a pickle that calls something is refused before it is called."""
    folder, marker = tmp_path / "checkpoint", tmp_path / "it-ran"
    folder.mkdir()
    write, name = HOSTILE[kind]
    write(folder, marker)
    with pytest.raises(UsageError, match=r"refused|not a file of torch\.save"):
        open_source(folder / name)
    assert not marker.exists()


def test_a_hostile_tensor_inside_of_dcp_data_is_refused(foreign: Path, tmp_path: Path) -> None:
    """The data files hold pickles too; they are read by the same rule."""
    folder = shutil.copytree(foreign / "fsdp", tmp_path / "fsdp")
    marker = tmp_path / "it-ran"
    hostile_torch_file(tmp_path / "evil.pt", marker)
    evil = (tmp_path / "evil.pt").read_bytes()
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for index, info in metadata.storage_data.items():
        if index.fqn == "model.scale":
            info.offset, info.length = (folder / info.relative_path).stat().st_size, len(evil)
            with (folder / info.relative_path).open("ab") as file:
                file.write(evil)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    source = open_source(folder)
    with pytest.raises(UsageError, match="refused"):
        source.weights["scale"].read()
    assert not marker.exists()


@pytest.mark.parametrize("name", ["../../evil", "a/b", ".."])
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    """An index or a `latest` file of a stranger cannot point elsewhere."""
    (tmp_path / "latest").write_text(name)
    with pytest.raises(UsageError, match="latest"):
        open_source(tmp_path)
    (tmp_path / "latest").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {{"w": "{name}"}}}}')
    with pytest.raises(UsageError, match="outside"):
        open_source(tmp_path)
