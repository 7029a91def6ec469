"""What a resumed run takes over from the one before."""

from pathlib import Path
from typing import Any

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
from enc.encoder.data.store import read_manifest
from enc.encoder.data.tokenizer import EncoderTokenizer
from enc.encoder.errors import UsageError
from enc.launcher.planning.plan import Plan, make_plan, self_contained, store_fingerprint
from enc.launcher.run_folder.records import refuse_older_run


def settled(run_dir: Path, config: RunConfig, allow_change: bool, say: Any) -> RunConfig:
    """Return the config, fixed to the checkpoint that it goes on from if it resumes a run.

    Raises UsageError when it cannot go on, or when a new run would meet the checkpoints of an older one.
    """
    remove_leftovers(run_dir)
    if config.trainer.resume_from_checkpoint:
        return resumed(run_dir, config, allow_change, say)
    if not config.trainer.overwrite_output_dir:
        refuse_older_run(run_dir)
    return config


def resumed(run_dir: Path, config: RunConfig, allow_change: bool, say: Any) -> RunConfig:
    """Find the checkpoint to go on from, compare its config with this one, and return this one fixed to it.

    Raises UsageError when there is no complete checkpoint, or when the change would not continue the same run.
    """
    folder, passed_over = find_checkpoint(run_dir, config.trainer.resume_from_checkpoint or "latest")
    for status in passed_over:
        say(passed_over_text(status))
    old = load_text((folder / "config.yaml").read_text(), str(folder / "config.yaml")).config
    plan = make_plan(_inherit(config, old))
    new = self_contained(plan)
    changes = {key: pair for key, pair in differences(old, new).items() if not _is_bookkeeping(key)}
    made_from, tokens = read_trainer_state(folder)["data_fingerprint"], store_fingerprint(plan)
    if made_from is None:  # an imported checkpoint does not know its text, but it has the tokenizer
        if config.tokenizer == old.tokenizer and _has_tokenizer_of(folder, plan):
            changes.pop("tokenizer.path", None)
    elif tokens not in (None, made_from):
        changes["the token store's contents"] = (made_from, tokens)
    if changes:
        say(
            "Changed since the checkpoint:\n" + "\n".join(f"  {key}: {a!r} -> {b!r}" for key, (a, b) in changes.items())
        )
    breaking = [key for key in changes if not keeps_numbers(key) and not _schedule_is_fixed(key, old, new)]
    if breaking and not allow_change:
        listed = "\n".join(f"- {key}: {changes[key][0]!r} -> {changes[key][1]!r}" for key in breaking)
        raise UsageError(
            f"The config differs from that of {folder} in ways that change what the run computes:\n{listed}\n"
            "Undo them for an exact continuation, or add --allow-change to go on with the new values."
        )
    say(f"Resuming from {folder}.")
    return plan.config.changed({"trainer.resume_from_checkpoint": str(folder.absolute())})


def set_aside(run_dir: Path, folder: Path, say: Any) -> None:
    """Take checkpoints that lie after the one to go on from out of the run's way."""
    aside = set_aside_newer(run_dir, read_trainer_state(folder)["step"])
    if aside:
        say(f"Newer checkpoints of this run are set aside: {', '.join(path.name for path in aside)}.")


def _has_tokenizer_of(folder: Path, plan: Plan) -> bool:
    """Tell whether the token store was made with the checkpoint's tokenizer; one that is yet to be made will be."""
    if not plan.store_ready:
        return True
    return (
        read_manifest(plan.store)["tokenizer"]["fingerprint"]
        == EncoderTokenizer.load(folder / "tokenizer").fingerprint()
    )


def passed_over_text(status: CheckpointStatus) -> str:
    return f"Passed over checkpoint {status.path}: it is {status.state} ({'; '.join(status.problems[:2])})."


def _inherit(config: RunConfig, old: RunConfig) -> RunConfig:
    """Take over what the first launch resolved: sizes from the tokenizer, and the global batch unless it is given."""
    updates: dict[str, Any] = {"model.vocab_size": old.model.vocab_size, "model.pad_token_id": old.model.pad_token_id}
    if config.trainer.global_batch_size is None:
        updates["trainer.global_batch_size"] = old.trainer.global_batch_size
    return config.changed(updates)


def _is_bookkeeping(key: str) -> bool:
    return key in (
        "trainer.resume_from_checkpoint",
        "trainer.output_dir",
        "trainer.overwrite_output_dir",
    )


def _schedule_is_fixed(key: str, old: RunConfig, new: RunConfig) -> bool:
    """Tell whether a change of `max_steps` leaves the learning rates as they are."""
    same = old.scheduler == new.scheduler
    fixed = new.scheduler.total_steps is not None
    constant = new.scheduler.name == "constant" and new.scheduler.warmup_percent is None
    return key == "trainer.max_steps" and same and (fixed or constant)
