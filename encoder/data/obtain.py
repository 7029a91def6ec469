"""Getting the tokenizer that a config names: a folder, a hub name, or one trained on the corpus."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
)

from enc.encoder.data.config import TokenizerConfig
from enc.encoder.data.sources.find import local_folder
from enc.encoder.data.tokenizer import (
    ALLOW_REWRITE,
    ROBERTA_SPECIALS,
    ROLE_KEYS,
    TOKENIZER_FILES,
    EncoderTokenizer,
    describe,
    find_roles,
    fingerprint,
    read_folder,
    special_tokens_template,
    write_training_rows,
)
from enc.encoder.data.tokenizer_train import train_tokenizer
from enc.encoder.errors import UsageError


def obtain_tokenizer(
    config: TokenizerConfig, read_texts: Callable[[], Iterable[str]], pad_id: int = 0
) -> EncoderTokenizer:
    """Return the tokenizer that a tokenizer section asks for: trained on the texts, from a folder, or from the hub.

    One that is trained pads with `pad_id`, 0 or 1.

    Raises:
        UsageError: it cannot be found or read, or it has no mask token and may not be given one.
    """
    if config.train is not None:
        return train_tokenizer(config.train, read_texts, pad_id)
    folder = local_folder(config)
    if folder is not None and (folder / "tokenizer.json").is_file():
        tokenizer, roles = read_folder(folder)
    else:
        tokenizer, roles = _fetch(config, folder)
    name = config.name if folder is None else str(folder.absolute())
    tokenizer, roles = complete_specials(tokenizer, roles, name, config.allow_special_token_rewrite)
    write_training_rows(tokenizer, roles)
    return describe(tokenizer, roles, name)


def identity(config: TokenizerConfig) -> dict[str, Any]:
    """Return the JSON description of the tokenizer that a section asks for, without loading or fetching it.

    A local folder is known by the checksums of its files, a hub tokenizer by name and revision, a trained one by how
    it is trained. Where a tokenizer.json is at hand, its fingerprint is added.
    """
    if config.train is not None:
        return {"train": config.train.identity()}
    rewrite = config.allow_special_token_rewrite
    folder = local_folder(config)
    if folder is None:
        return {"name": config.name, "revision": config.revision, "allow_special_token_rewrite": rewrite}
    contents = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
    files = {name: hashlib.blake2b(content, digest_size=16).hexdigest() for name, content in contents.items()}
    described: dict[str, Any] = {"files": files, "allow_special_token_rewrite": rewrite}
    if "tokenizer.json" in contents:
        try:
            described["fingerprint"] = fingerprint(contents["tokenizer.json"].decode())
        except (ValueError, TypeError) as error:
            raise UsageError(f"{folder / 'tokenizer.json'} is not a readable tokenizer: {error}.") from error
    return described


def _fetch(config: TokenizerConfig, folder: Path | None) -> tuple[Tokenizer, dict[str, str]]:
    """Get a tokenizer through transformers, which downloads it or converts its older formats."""
    from transformers import AutoTokenizer

    source = config.name if folder is None else str(folder)
    try:
        fetched = AutoTokenizer.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code, use_fast=True
        )
        tokenizer = fetched.backend_tokenizer
    except Exception as error:  # hub client, network libraries and converters each raise their own
        raise UsageError(
            f"Cannot get the tokenizer {source!r}: {' '.join(str(error).split())} Check the name and the network, "
            "give a folder with tokenizer.json in tokenizer.path, or train one on the corpus with "
            "tokenizer.train.model=wordpiece."
        ) from error
    named = {key: getattr(fetched, key, None) for keys in ROLE_KEYS.values() for key in keys}
    return tokenizer, find_roles(tokenizer, named)


def complete_specials(
    tokenizer: Tokenizer, roles: dict[str, str], name: str, allow_rewrite: bool
) -> tuple[Tokenizer, dict[str, str]]:
    """Add what is missing: a padding token always; a mask token, with the whole RoBERTa-style set, only if allowed.

    Raises:
        UsageError: there is no mask token and `allow_rewrite` is false.
    """
    if "mask" not in roles:
        if not allow_rewrite:
            raise UsageError(f"The tokenizer {name} has no mask token. {ALLOW_REWRITE}")
        roles = dict(ROBERTA_SPECIALS)
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in roles.values()])
        tokenizer.post_processor = special_tokens_template(tokenizer, roles["cls"], roles["sep"])
    if "pad" not in roles:
        roles = {**roles, "pad": ROBERTA_SPECIALS["pad"]}
        tokenizer.add_special_tokens([AddedToken(roles["pad"], special=True, normalized=False)])
    return tokenizer, roles
