"""What a resumed run takes over from the one before."""

import os
from pathlib import Path
from typing import Any

import yaml

from enc.encoder.checkpoints.folder import (
    CheckpointStatus,
    find_checkpoint,
    read_trainer_state,
    remove_leftovers,
    set_aside_newer,
)
from enc.encoder.config.fields import keeps_numbers
from enc.encoder.config.load import load_text
from enc.encoder.config.schema import RunConfig, differences
from enc.encoder.data.sources.find import is_store
from enc.encoder.data.tokenizer import EncoderTokenizer
from enc.encoder.errors import UsageError
from enc.encoder.printable import Say
from enc.launcher.machine.facts import MachineFacts
from enc.launcher.planning.plan import Plan, plan_run, run_folder
from enc.launcher.planning.render import self_contained
from enc.launcher.run_folder.records import refuse_older_run

_PLACES = (("dataset", "path"), ("trainer", "output_dir"), ("tokenizer", "path"))


def plan_or_resume(config: RunConfig, facts: MachineFacts, allow_change: bool, say: Say) -> Plan:
    """Plan a run under its lock; one that resumes is fixed to the checkpoint that it goes on from.

    Raises UsageError when it cannot go on, or when a new run would meet the checkpoints of an older one.
    """
    run_dir = run_folder(config, facts)
    remove_leftovers(run_dir)
    if config.trainer.resume_from_checkpoint:
        return resumed(run_dir, config, facts, allow_change, say)
    if not config.trainer.overwrite_output_dir:
        refuse_older_run(run_dir)
    return plan_run(config, facts)


def resumed(run_dir: Path, config: RunConfig, facts: MachineFacts, allow_change: bool, say: Say) -> Plan:
    """Find the checkpoint to go on from, plan the run that goes on, and compare its config with the checkpoint's.

    Raises UsageError when there is no complete checkpoint, or when the change would not continue the same run.
    """
    folder, passed_over = find_checkpoint(run_dir, config.trainer.resume_from_checkpoint or "latest")
    for status in passed_over:
        say(passed_over_text(status))
    old = load_text((folder / "config.yaml").read_text(), str(folder / "config.yaml")).config
    plan = plan_run(_inherit(config, old, folder), facts)
    new = self_contained(plan)
    changes = _changes(folder, old, new, plan)
    if changes:
        listed = "\n".join(f"  {key}: {was!r} -> {now!r}" for key, (was, now) in changes.items())
        say(f"Changed since the checkpoint:\n{listed}")
    breaking = [key for key in changes if not keeps_numbers(key) and not _schedule_is_fixed(key, old, new)]
    if breaking and not allow_change:
        listed = "\n".join(f"- {key}: {changes[key][0]!r} -> {changes[key][1]!r}" for key in breaking)
        raise UsageError(
            f"The config differs from that of {folder} in ways that change what the run computes:\n{listed}\n"
            "Undo them for an exact continuation, or add --allow-change to go on with the new values."
        )
    say(f"Resuming from {folder}.")
    return plan


def _changes(folder: Path, old: RunConfig, new: RunConfig, plan: Plan) -> dict[str, tuple[Any, Any]]:
    """Return what a run computes from and what differs from the checkpoint: key -> (there, now)."""
    differing = differences(old, new).items()
    changes = {key: pair for key, pair in differing if not (_is_bookkeeping(key) or _is_settled_now(key, pair[0]))}
    made_from, tokens = read_trainer_state(folder)["data_fingerprint"], plan.store_facts.fingerprint
    if made_from is None:  # an imported checkpoint does not know its text, but it has the tokenizer
        if plan.asked.tokenizer == old.tokenizer and _has_tokenizer_of(folder, plan):
            changes.pop("tokenizer.path", None)
    elif tokens not in (None, made_from):
        changes["the token store's contents"] = (made_from, tokens)
    elif tokens == made_from:  # which says that the tokenizer is the same, wherever it lies
        changes.pop("tokenizer.path", None)
    return changes


def moved_store(run_dir: Path) -> dict[str, Any]:
    """Return where the store of a run is, as a change of its config, if both were moved together; else nothing."""
    old = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8")) or {}
    store, was_run, tokenizer = (Path((old.get(section) or {}).get(key) or "") for section, key in _PLACES)
    now = Path(os.path.normpath(run_dir.absolute() / os.path.relpath(store, was_run)))
    if store.exists() or not (store.is_absolute() and was_run.is_absolute() and is_store(now)):
        return {}
    moved = {"dataset.path": str(now)}
    return moved | ({"tokenizer.path": str(now / "tokenizer")} if tokenizer == store / "tokenizer" else {})


def set_aside(run_dir: Path, folder: Path, say: Say) -> None:
    """Take checkpoints that lie after the one to go on from out of the run's way."""
    aside = set_aside_newer(run_dir, read_trainer_state(folder)["step"])
    if aside:
        say(f"Newer checkpoints of this run are set aside: {', '.join(path.name for path in aside)}.")


def _has_tokenizer_of(folder: Path, plan: Plan) -> bool:
    """Tell whether the token store was made with the checkpoint's tokenizer; one that is yet to be made will be."""
    manifest = plan.store_facts.manifest
    if manifest is None:
        return True
    made_with: str = manifest["tokenizer"]["fingerprint"]
    return made_with == EncoderTokenizer.load(folder / "tokenizer").fingerprint()


def passed_over_text(status: CheckpointStatus) -> str:
    return f"Passed over checkpoint {status.path}: it is {status.state} ({'; '.join(status.problems[:2])})."


def _inherit(config: RunConfig, old: RunConfig, folder: Path) -> RunConfig:
    """Go on from a checkpoint with what the first launch resolved: sizes from the tokenizer, batch, precision."""
    updates: dict[str, Any] = {
        "model.vocab_size": old.model.vocab_size, "model.pad_token_id": old.model.pad_token_id,
        "trainer.resume_from_checkpoint": str(folder.absolute()),
    }  # fmt: skip
    if config.trainer.global_batch_size is None:
        updates["trainer.global_batch_size"] = old.trainer.global_batch_size
    if config.trainer.mixed_precision == "auto":
        updates["trainer.mixed_precision"] = old.trainer.mixed_precision
    return config.changed(updates)


def _is_bookkeeping(key: str) -> bool:
    return key in (
        "trainer.resume_from_checkpoint",
        "trainer.output_dir",
        "trainer.overwrite_output_dir",
    )


def _is_settled_now(key: str, was: Any) -> bool:
    """Tell whether an imported checkpoint left to a launch what this one settles."""
    return was == "auto" and key in ("trainer.mixed_precision", "parallel.engine", "launch.scheduler")


def _schedule_is_fixed(key: str, old: RunConfig, new: RunConfig) -> bool:
    """Tell whether a change of `max_steps` leaves the learning rates as they are."""
    same = old.scheduler == new.scheduler
    fixed = new.scheduler.total_steps is not None
    constant = new.scheduler.name == "constant" and new.scheduler.warmup_percent is None
    return key == "trainer.max_steps" and same and (fixed or constant)
