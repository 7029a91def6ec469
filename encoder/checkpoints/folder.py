"""The checkpoint folder: what makes one complete, which one is the latest or the best, which ones may go. No torch.

    <run>/checkpoints/<step>/
        model.safetensors   fp32 weights, portable         state/             moments, fp32, one file a rank
        trainer_state.json  step, counters                 config.yaml        the run's whole config
        tokenizer/  tokenizer_info.json                    manifest.json      bytes and xxh3 of every file, written last

A folder named by a step was finished; all other names are on the way to it or away from it:

    .<step>.tmp ──written, renamed──▶ <step> ──pruned──▶ .<step>.deleted ──▶ gone
         │                            │    └──the run went on from an older one──▶ <step>.abandoned-<n>, which stays
         └──save failed──▶ gone       └──saved again──▶ .<step>.replaced ──the new one has the name──▶ gone

What a killed process leaves is dealt with at the next save: `.tmp` and `.deleted` go; `.replaced` takes its name back
when the new one had not got it, else it goes. What `verify` says of a finished folder:

    complete      all files are as the manifest says: it may be resumed, and counts when older ones are pruned
    damaged       a file is missing, unknown, of another size or content, or the manifest is broken: reasons are listed
    unverifiable  it has no manifest

Neither of the last two is resumed, counted or deleted; `latest` is the newest complete one, and what it passed over is
named.
"""

import json
import math
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from enc.encoder.errors import UsageError
from enc.encoder.files import file_checksum, fsync_directory, read_json

MANIFEST = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class CheckpointStatus:
    """What is known about one checkpoint folder."""

    path: Path
    state: str  # complete | damaged | unverifiable
    problems: list[str] = field(default_factory=list)
    num_bytes: int = 0

    @property
    def step(self) -> int | None:
        return _step_of(self.path.name)


def checkpoints_dir(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return the finished checkpoint folders of a run, oldest first."""
    folder = checkpoints_dir(run_dir)
    if not folder.is_dir():
        return []
    steps = {p: _step_of(p.name) for p in folder.iterdir() if p.is_dir()}
    return sorted((p for p, step in steps.items() if step is not None), key=lambda p: int(p.name))


def _step_of(name: str) -> int | None:
    return int(name) if name.isascii() and name.isdecimal() else None


# --- manifest --------------------------------------------------------------------------------------------------------


def _files_below(folder: Path) -> list[str]:
    files = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return sorted(name for name in files if name != MANIFEST)


def _manifest_text(content: dict[str, Any]) -> str:
    """Return the canonical text of a manifest, sealed with a checksum of its own content."""
    body = json.dumps(content, indent=1, sort_keys=True)
    return json.dumps({**content, "seal": xxhash.xxh3_64_hexdigest(body.encode())}, indent=1, sort_keys=True) + "\n"


def write_manifest(folder: Path, step: int, checksums: dict[str, str] | None = None) -> None:
    """Write the manifest of a folder whose other files are all in place, and flush everything to disk.

    `checksums` are those of files that are flushed already, by name; the others are read.
    """
    known = checksums or {}
    files = {}
    for name in _files_below(folder):
        path = folder / name
        if name not in known:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        files[name] = {"bytes": path.stat().st_size, "xxh3_64": known.get(name) or file_checksum(path)}
    with (folder / MANIFEST).open("w") as file:
        file.write(_manifest_text({"format": FORMAT, "step": step, "files": files}))
        file.flush()
        os.fsync(file.fileno())
    for directory in [folder, *(p for p in folder.rglob("*") if p.is_dir())]:
        fsync_directory(directory)


def verify(folder: Path, contents: bool = True) -> CheckpointStatus:
    """Compare a checkpoint with its manifest; ``contents=False`` looks at names and sizes only."""
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
    except FileNotFoundError:
        return CheckpointStatus(folder, "unverifiable", [f"{MANIFEST} is missing"], _size(folder))
    except (OSError, UnicodeDecodeError) as error:
        return CheckpointStatus(folder, "damaged", [f"{MANIFEST} cannot be read: {error}"], _size(folder))
    problems = _manifest_problems(text)
    if problems:
        return CheckpointStatus(folder, "damaged", problems, _size(folder))
    files = json.loads(text)["files"]
    for name, expected in files.items():
        problems += _file_problems(folder / name, name, expected, contents)
    problems += [f"{name} is not in the manifest" for name in _files_below(folder) if name not in files]
    return CheckpointStatus(folder, "damaged" if problems else "complete", problems, _size(folder))


def _manifest_problems(text: str) -> list[str]:
    try:
        content = json.loads(text)
        seal_less = {key: value for key, value in content.items() if key != "seal"}
        if content.get("format", FORMAT) > FORMAT:
            return [f"{MANIFEST} has format {content['format']}, this version reads {FORMAT}"]
        if text == _manifest_text(seal_less) and isinstance(content.get("files"), dict):
            return []
    except (ValueError, TypeError, AttributeError):
        pass
    return [f"{MANIFEST} does not match its own seal"]


def _file_problems(path: Path, name: str, expected: dict[str, Any], contents: bool) -> list[str]:
    if not path.is_file():
        return [f"{name} is missing"]
    size = path.stat().st_size
    if size != expected["bytes"]:
        return [f"{name} has {size} bytes, the manifest says {expected['bytes']}"]
    if contents and file_checksum(path) != expected["xxh3_64"]:
        return [f"{name} has other contents than the manifest says"]
    return []


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


# --- which one -------------------------------------------------------------------------------------------------------


def newest_complete(run_dir: Path) -> tuple[Path | None, list[CheckpointStatus]]:
    """Return the newest complete checkpoint of a run and the newer ones that were passed over."""
    passed_over: list[CheckpointStatus] = []
    for path in reversed(list_checkpoints(run_dir)):
        status = verify(path)
        if status.state == "complete":
            return path, passed_over
        passed_over.append(status)
    return None, passed_over


def find_checkpoint(run_dir: Path, which: str | int | bool) -> tuple[Path, list[CheckpointStatus]]:
    """Return the checkpoint meant by `latest` (or True), `best`, a step or a path, and the newer ones passed over.

    Raises UsageError when there is none, or when the one asked for is not complete.
    """
    if which is True or which in ("latest", "auto", "best"):
        found, passed_over = newest_complete(run_dir)
        if found is None:
            raise UsageError(_nothing_to_resume(run_dir, passed_over))
        if which != "best":
            return found, passed_over
        step = best_step(found)
        if step is None:
            raise UsageError(
                f"{run_dir} has no best checkpoint: none was chosen up to step {found.name}. Set "
                "trainer.metric_for_best_model before the run evaluates, or name `latest` or a step."
            )
        return find_checkpoint(run_dir, step)[0], passed_over
    path = checkpoints_dir(run_dir) / str(which) if _step_of(str(which)) is not None else Path(str(which))
    if not path.is_dir():
        steps = ", ".join(p.name for p in list_checkpoints(run_dir)) or "none"
        raise UsageError(f"There is no checkpoint {path}. Checkpoints of {run_dir}: {steps}.")
    refuse_other_folder(path)
    status = verify(path)
    if status.state != "complete":
        raise UsageError(
            f"Checkpoint {path} is {status.state}: {'; '.join(status.problems[:3])}. "
            "Choose another one (`enc ckpt ls` shows them) or `latest`, which passes over damaged ones."
        )
    return path, []


def refuse_other_folder(path: Path) -> None:
    """Raise UsageError when a folder has nothing of a checkpoint in it."""
    if not any((path / name).is_file() for name in (MANIFEST, "trainer_state.json", "model.safetensors")):
        raise UsageError(
            f"{path} is not a checkpoint: it has neither {MANIFEST} nor trainer_state.json nor model.safetensors. "
            "Name a folder <run>/checkpoints/<step>."
        )


def _nothing_to_resume(run_dir: Path, passed_over: list[CheckpointStatus]) -> str:
    if not passed_over:
        return f"There is nothing to resume: {checkpoints_dir(run_dir)} holds no checkpoint. Start with `enc launch`."
    damage = "; ".join(f"{s.path.name} is {s.state} ({s.problems[0]})" for s in passed_over)
    return (
        f"There is no complete checkpoint in {checkpoints_dir(run_dir)}: {damage}. "
        "Nothing was changed. Restore one from a backup, or start a new run in another trainer.output_dir."
    )


def split_name(path: Path) -> tuple[Path, str] | None:
    """Return (run folder, name) of a path that ends in `latest` or `best`, as `<run>/best`; None for any other."""
    if path.name not in ("latest", "best") or path.exists():
        return None
    run_dir = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    return (run_dir, path.name) if checkpoints_dir(run_dir).is_dir() else None


def best_step(folder: Path) -> int | None:
    """Return the step of the best checkpoint up to this one; None when none was chosen."""
    best = read_trainer_state(folder).get("best")
    return best["step"] if best else None


def read_trainer_state(folder: Path) -> dict[str, Any]:
    """Return the counters saved with a checkpoint."""
    state: dict[str, Any] = read_json(folder / "trainer_state.json")
    return state


# --- disk space ------------------------------------------------------------------------------------------------------


def prune(run_dir: Path, keep: int | None) -> list[Path]:
    """Delete all but the newest `keep` complete checkpoints (0 or None keeps all) and return what was deleted."""
    remove_leftovers(run_dir)
    doomed = prunable(run_dir, keep)
    for path in doomed:
        hidden = path.with_name(f".{path.name}.deleted")
        path.rename(hidden)  # a folder that is half deleted must not look like a checkpoint
        shutil.rmtree(hidden)
    return doomed


def prunable(run_dir: Path, keep: int | None) -> list[Path]:
    """Return the checkpoints that `prune` deletes.

    Damaged folders do not count as kept and are left alone, and so are the newest complete one with a finite loss and
    the one that the newest complete one knows as the best.
    """
    if not keep:
        return []
    complete = [p for p in list_checkpoints(run_dir) if verify(p, contents=False).state == "complete"]
    kept = set(complete[-keep:])
    healthy = [p for p in complete if _is_finite(p)]
    kept.update(healthy[-1:])
    if complete and (best := best_step(complete[-1])) is not None:
        kept.add(checkpoints_dir(run_dir) / str(best))
    return [p for p in complete if p not in kept]


def _is_finite(folder: Path) -> bool:
    return bool(read_trainer_state(folder).get("loss_is_finite", True))


def remove_leftovers(run_dir: Path) -> None:
    """Remove what an interrupted save or deletion left behind; a checkpoint that was being replaced comes back."""
    folder = checkpoints_dir(run_dir)
    for path in folder.glob(".*.replaced"):
        original = path.with_name(path.name[1:].removesuffix(".replaced"))
        if not original.exists():
            path.rename(original)
    for pattern in (".*.tmp", ".*.deleted", ".*.replaced"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def set_aside_newer(run_dir: Path, step: int) -> list[Path]:
    """Rename the complete checkpoints after `step` to `<step>.abandoned-<n>` and return the new names.

    A run that goes on from an older checkpoint takes another way: those that it leaves behind must neither be `latest`
    nor count as the newest when older ones are pruned.
    """
    aside = []
    for path in list_checkpoints(run_dir):
        if int(path.name) > step and verify(path, contents=False).state == "complete":
            number = 1
            while (target := path.with_name(f"{path.name}.abandoned-{number}")).exists():
                number += 1
            aside.append(path.rename(target))
    return aside


def free_bytes_missing(folder: Path, needed: int, keep_free: float) -> int:
    """Return how many bytes the disk of `folder` lacks to take `needed` and still have `keep_free` left; 0 if none."""
    existing = next(p for p in [folder, *folder.absolute().parents] if p.exists())
    return max(0, math.ceil(needed + keep_free - shutil.disk_usage(existing).free))
