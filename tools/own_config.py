"""The run config that lies in a checkpoint of ours."""

from pathlib import Path

from enc.encoder.config.load import load_text
from enc.encoder.config.schema import RunConfig
from enc.tools.readers.source import damaged


def own_config(folder: Path) -> RunConfig | None:
    """Return the config of a checkpoint's run; None when it has none. Raises UsageError when it cannot be read."""
    file = folder / "config.yaml"
    if not file.is_file():
        return None
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise damaged(file, f"it is not text ({error})") from None
    return load_text(text, str(file)).config
