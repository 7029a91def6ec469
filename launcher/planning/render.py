"""The files of a run folder that the ranks read. Pure."""

from typing import Any

from enc.encoder.config.schema import RunConfig
from enc.encoder.models import first_weights
from enc.launcher.planning.plan import Plan


def render(plan: Plan) -> dict[str, str]:
    """Return the files of a run folder that the trainer reads, as text; a pure function of the plan."""
    return {"config.yaml": self_contained(plan).to_yaml(), **plan.engine_files}


def self_contained(plan: Plan) -> RunConfig:
    """Return the plan's config with absolute folders, and text and tokenizer taken from the token store.

    A run can then go on from any working directory, whatever became of its sources and its site profile.
    """
    updates: dict[str, Any] = {
        "trainer.output_dir": str(plan.run_dir), "dataset.path": str(plan.store), "dataset.validation_file": None,
        "dataset.test_file": None, "launch.site": None,
    }  # fmt: skip
    if plan.config.trainer.tensorboard_dir:
        updates["trainer.tensorboard_dir"] = str(plan.cwd / plan.config.trainer.tensorboard_dir)
    if plan.config.tokenizer.train is None:
        updates["tokenizer.path"] = str(plan.store / "tokenizer")
    if folder := first_weights.folder_of(plan.config.model):
        updates["model.init_from"] = str(plan.cwd / folder)
    return plan.config.changed(updates)
