"""Publishing an exported folder on the Hugging Face hub."""

from pathlib import Path
from typing import Any

from enc.encoder.errors import RunError, UsageError


def hub_of(repository: str) -> Any:
    """Return the hub's client after asking who we are. Raises UsageError for a bad name or without a login."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    api = HfApi()
    try:
        validate_repo_id(repository)
        api.whoami()
    except Exception as error:  # the client, its network libraries and its offline mode each raise their own
        raise UsageError(
            f"--push-to-hub {repository}: {_first_line(error)} Nothing was exported. Log in with `hf auth login` or "
            "set HF_TOKEN, and name the repository as USER/NAME; or export without --push-to-hub."
        ) from None
    return api


def push(api: Any, folder: Path, repository: str, private: bool) -> str:
    """Upload a folder as one commit and return its address. Raises RunError; the folder stays."""
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        done = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload an export of enc")
    except Exception as error:
        raise RunError(
            f"{folder} is exported, but could not be uploaded to {repository}: {_first_line(error)} Repeat with "
            f"`hf upload {repository} {folder}`."
        ) from None
    return str(done.commit_url)


def _first_line(error: Exception) -> str:
    line = (str(error).strip() or type(error).__name__).split("\n")[0].rstrip(".")
    return f"{line}."
