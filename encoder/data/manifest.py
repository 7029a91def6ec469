"""What a token store says of itself: its `manifest.json`, read and compared without opening the data. No numpy."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from enc.encoder.errors import UsageError
from enc.encoder.files import file_checksum

FORMAT = "enc-token-store"
VERSION = 1


def open_manifest(path: str | Path) -> dict[str, Any]:
    """Return the manifest of a store of which every file is there, with its size.

    Raises:
        UsageError: as `read_manifest`, or a file is missing or has another size.
    """
    path = Path(path)
    manifest = read_manifest(path)
    damage = [text for name, file in manifest["files"].items() if (text := _size_damage(path / name, file["bytes"]))]
    if damage:
        raise UsageError(f"The token store {path} is damaged: {listed(damage)}. {rebuild(path)}")
    return manifest


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Return the manifest of a store after checking its structure.

    Keys: `format`, `version`, `request` (tokenizer, source, settings: what was asked for), `tokenizer` (name,
    fingerprint, num_tokens), `splits` (name -> documents, tokens), `files` (path -> bytes, xxh3_64). Stores of newer
    versions also have `statistics` (split -> characters, unknown_tokens, unknown_documents), `sources` (what was read
    and what was left out), `content` (section -> file of the source -> checksum), and `bad_rows` where some were left
    out.

    Raises:
        UsageError: there is no manifest, or it is not one of a complete store of this format.
    """
    path = Path(path) / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"{path.parent} is not a token store: {path.name} cannot be read ({error.strerror}). Run `enc preprocess` "
            f"to make one."
        ) from error
    except ValueError as error:
        raise UsageError(f"{path} is damaged: {error}. {rebuild(path.parent)}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UsageError(f"{path.parent} is not a token store: its manifest.json is of another kind of folder.")
    if manifest.get("version") != VERSION:
        raise UsageError(
            f"{path.parent} is a token store of version {manifest.get('version')}; this enc reads version {VERSION}. "
            + rebuild(path.parent)
        )
    try:
        _check_structure(manifest)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UsageError(f"{path} is damaged: {error!r} in its structure. {rebuild(path.parent)}") from error
    return manifest


def _check_structure(manifest: dict[str, Any]) -> None:
    for key in ("tokenizer", "source", "settings"):
        manifest["request"][key].items()
    int(manifest["tokenizer"]["num_tokens"]), str(manifest["tokenizer"]["fingerprint"])
    if "train" not in manifest["splits"]:
        raise KeyError("train")
    for split in manifest["splits"].values():
        int(split["documents"]), int(split["tokens"])
    for file in manifest["files"].values():
        int(file["bytes"]), str(file["xxh3_64"])


def rebuild(path: Path) -> str:
    """Return what to do about a damaged store."""
    return f"Delete {path} and run `enc preprocess` again."


def data_fingerprint(manifest: dict[str, Any]) -> str:
    """Return 16 hexadecimal digits that are equal for stores with the same tokens and the same tokenizer."""
    files = sorted((name, file["xxh3_64"]) for name, file in manifest["files"].items() if "/data-" in name)
    return xxhash.xxh3_64_hexdigest(f"{files} {manifest['tokenizer']['fingerprint']}".encode())


def check_matches(manifest: dict[str, Any], wanted: dict[str, Any], path: str | Path) -> None:
    """Check that the store at `path` is the one that a config asks for.

    `manifest` needs its `request` and, to tell that two names mean one tokenizer, its `tokenizer`; `wanted` is a
    request (`preprocess.wanted_request`). Only the sections that `wanted` has are compared.

    Raises:
        UsageError: names every difference (was, asked) and what to do.
    """
    differences = list(_differences(manifest, wanted))
    if differences:
        raise UsageError(
            f"The tokens in {path} were made from something else than this config asks for: "
            + "; ".join(differences)
            + ". "
            f"Set dataset.pre_tokenize_output to another folder, or delete {path} to make it again, or change the "
            f"config back."
        )


def _differences(manifest: dict[str, Any], wanted: dict[str, Any]) -> Iterator[str]:
    for section, asked in wanted.items():
        was = manifest["request"].get(section, {})
        if section == "tokenizer" and _same_tokenizer(manifest, asked):
            continue
        if was != asked and not (was and asked):
            yield f"{section} was {was.get('location', 'none')}, asked is {asked.get('location', 'none')}"
            continue
        same = _same_content(was, asked, manifest.get("content", {}).get(section, {}))
        for key in sorted({*was, *asked} - ({"files", "location"} if same else set())):
            old, new = was.get(key), asked.get(key)
            if old == new:
                continue
            if key == "files" and isinstance(old, dict) and isinstance(new, dict):
                yield f"{section} files: {_file_differences(old, new)}"
            else:
                yield f"{section}.{key} was {json.dumps(old)}, asked is {json.dumps(new)}"


def _same_tokenizer(manifest: dict[str, Any], asked: dict[str, Any]) -> bool:
    made = manifest.get("tokenizer", {}).get("fingerprint")
    return made is not None and asked.get("fingerprint") == made


def _same_content(was: dict[str, Any], asked: dict[str, Any], digests: dict[str, str]) -> bool:
    """Tell whether files that are in another place, or newer, hold the bytes that the store was made from."""
    old, new = was.get("files"), asked.get("files")
    if was == asked or not old or not new or old.keys() != new.keys() or digests.keys() != new.keys():
        return False
    if any(old[name][0] != new[name][0] for name in new):
        return False
    moved = was["location"] != asked["location"]
    doubtful = [name for name in new if moved or old[name] != new[name]]
    try:
        return all(file_checksum(Path(asked["location"], name)) == digests[name] for name in doubtful)
    except OSError:
        return False


def _file_differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    groups = {
        "missing": [name for name in old if name not in new],
        "new": [name for name in new if name not in old],
        "changed": [name for name in old if name in new and old[name] != new[name]],
    }
    return ", ".join(
        f"{len(names)} {what} ({names[0]}{', …' if names[1:] else ''})" for what, names in groups.items() if names
    )


def _size_damage(file: Path, size: int) -> str | None:
    try:
        found = file.stat().st_size
    except OSError:
        return f"{file.name} is missing"
    return None if found == size else f"{file.name} has {found} bytes, not {size}"


def listed(items: list[str]) -> str:
    """Return the first few, and how many more there are."""
    return "; ".join(items[:3]) + (f"; and {len(items) - 3} more" if len(items) > 3 else "")
