"""Opening a checkpoint of any format."""

from pathlib import Path

from enc.encoder.errors import UsageError
from enc.tools.readers import annotated, folders, universal, zero
from enc.tools.readers.source import Source

FORMATS = (
    "checkpoints of enc and annotated-mpnet, DeepSpeed folders (ZeRO 0 to 3, universal), torch.distributed.checkpoint "
    "folders, Hugging Face and Accelerate folders, and files .safetensors, .pt, .pth, .bin, .ckpt"
)


def open_source(path: Path, trust: bool = False) -> Source:
    """Return the tensors of a file or folder, without reading their values.

    With `trust` a single file's pickle may ask for more than tensors; then it is loaded whole. Raises UsageError when
    the path is of no known format, is incomplete, or holds a pickle that asks for more than tensors.
    """
    if not path.exists():
        raise UsageError(f"There is no file or folder {path}. Name a checkpoint.")
    source = folders.read_file(path, trust) if path.is_file() else _open_folder(path)
    if source is None or not source.weights:
        raise UsageError(f"{path} holds no checkpoint that can be read. Read are {FORMATS}.")
    return source


def _open_folder(path: Path) -> Source | None:
    if folders.is_ours(path):
        return folders.read_ours(path)
    if found := universal.find_folder(path):
        return universal.read(found)
    if found := zero.find_folder(path):
        return zero.read(found)
    if several := _dcp_folders(path):
        from enc.tools.readers import dcp  # imports torch.distributed: a second, which others need not wait for

        return dcp.read(path, several)
    return folders.read_folder(path)


def _dcp_folders(path: Path) -> list[Path]:
    """Return the DCP folders that a path means: itself, or those in it, as Accelerate writes weights and optimizer."""
    if (path / ".metadata").is_file():
        return [path]
    return sorted(p.parent for p in path.glob("*/.metadata"))


def newest_foreign(path: Path) -> Path | None:
    """Return the newest checkpoint of a run folder of NeoBERT (`checkpoints/<step>`, earlier `model_checkpoints`).

    In a folder of annotated-mpnet that is `checkpoint<step>.pt`. None for any other path, run folders of enc among
    them.
    """
    for name in ("checkpoints", "model_checkpoints"):
        steps = [p for p in (path / name).glob("[0-9]*") if p.is_dir() and p.name.isdigit()]
        if steps and not any(folders.is_ours(p) for p in steps):
            return max(steps, key=lambda p: int(p.name))
    return annotated.newest(path)
