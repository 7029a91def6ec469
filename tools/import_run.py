"""A run folder made from a checkpoint that another program wrote, so that `enc resume` goes on with it."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from enc.encoder.checkpoints.folder import write_manifest
from enc.encoder.config.schema import RunConfig
from enc.encoder.data.tokenizer import EncoderTokenizer
from enc.encoder.errors import UsageError
from enc.encoder.events import Event, append_event
from enc.encoder.files import write_json
from enc.encoder.models import first_weights
from enc.encoder.models.architecture import Shape
from enc.encoder.models.registry import parameters_of
from enc.encoder.optim.state_spec import num_bytes, state_spec
from enc.encoder.run.state import TrainState, trainer_state
from enc.encoder.tasks import TASKS
from enc.tools.consolidate import write_file
from enc.tools.models.fitting import Derived, ModelState
from enc.tools.models.registry import tools_of, tools_of_hub_config
from enc.tools.output import new_output, refuse_taken
from enc.tools.readers import annotated
from enc.tools.readers.source import Source, Stored, damaged, read_json

# What lies beside a checkpoint and why nothing is taken from it.
_NOT_CARRIED = {
    "random_states_*.pkl": "states of random generators; every draw follows from the seed here",
    "rng_state*.pth": "states of random generators; every draw follows from the seed here",
    "scheduler.*": "the scheduler object; learning rates follow from the config and the step",
    "sampler*.bin": "the sampler's position; the rows of a step follow from the seed and the step",
    "dl_state_dict*.bin": "the data loader's position; the rows of a step follow from the seed and the step",
    "scaler.pt": "the loss scaler; bf16 needs none",
    "custom_checkpoint_*.pkl": "its counters other than steps and tokens",
}
# What is in a checkpoint of annotated-mpnet, and why nothing is taken from it.
_ANNOTATED = (
    "rng_state, collator_rng_state: states of random generators; every draw follows from the seed here",
    "data_state: the place in its files; the rows of a step follow from the seed and the step",
    "samples_processed: it counts texts; the count of tokens begins at 0",
)


@dataclass(frozen=True)
class Imported:
    """What was made, and what of the source is not in it."""

    run_dir: Path
    step: int
    has_moments: bool
    not_carried: list[str]


def nearest_config(path: Path) -> Path | None:
    """Return the config.yaml of a checkpoint: beside its tensors or up to three folders above."""
    return next((p / "config.yaml" for p in _near(path) if (p / "config.yaml").is_file()), None)


def hf_model_keys(path: Path) -> dict[str, Any]:
    """Return the keys of the model section that a Hugging Face config.json gives; none when there is no such file."""
    file = path / "config.json"
    if not file.is_file():
        return {}
    found = read_json(file)
    if not isinstance(found, dict):
        raise damaged(file, "it is not a config")
    return tools_of_hub_config(found).hub_keys(found, file)


def import_run(source: Source, out: Path, config: RunConfig, tokenizer_dir: Path | None) -> Imported:
    """Make the run folder `out` with one complete checkpoint from a checkpoint of another program.

    Weights, moments, step and token count are carried over; moments are zero when the source has none, or those of
    another optimizer. Raises UsageError when the source does not fit the config or its tokenizer, or `out` is taken.
    """
    refuse_taken(out)
    tokenizer = EncoderTokenizer.load(tokenizer_dir or _nearest_tokenizer(source.path))
    state = tools_of(config.model).state(source, config.model, tokenizer, config.optimizer)
    step = int(source.counters.get("step") or 0)
    config = _run_config(config, state, source, tokenizer, out, step)
    shapes = {name: tensor.spec.shape for name, tensor in state.weights.items()}
    kept = state_spec(config.optimizer, parameters_of(state.model)).kept(shapes)
    with new_output(out, num_bytes({**shapes, **kept})) as partial:
        folder = partial / "checkpoints" / str(step)
        (folder / "state").mkdir(parents=True)
        _write(folder / "model.safetensors", state.weights)
        _write(folder / "state" / "moments.safetensors", state.moments or _zeros(kept))
        for place in (partial, folder):
            (place / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        tokenizer.save(folder / "tokenizer")
        write_json(folder / "tokenizer_info.json", tokenizer.info())
        write_json(folder / "trainer_state.json", _trainer_state(source, state, step))
        append_event(partial, Event.IMPORTED, step=step, source=str(source.path.absolute()))
        write_manifest(folder, step)
    return Imported(out, step, bool(state.moments), _not_carried(source, bool(state.moments)))


def _near(path: Path) -> list[Path]:
    folder = path if path.is_dir() else path.parent
    return [folder, *folder.absolute().parents[:3]]


def _nearest_tokenizer(path: Path) -> Path:
    for folder in _near(path):
        for found in (folder / "tokenizer", folder):
            if (found / "tokenizer.json").is_file():
                return found
    raise UsageError(f"There is no tokenizer.json at {path} or above it. Name its folder: --tokenizer DIR.")


def _run_config(
    config: RunConfig, state: ModelState, source: Source, tokenizer: EncoderTokenizer, out: Path, step: int
) -> RunConfig:
    """Return the config of the run: sizes and head from the source, the batch as large as it was, folders absolute."""
    trainer, ranks = config.trainer, int(source.counters.get("world_size") or _num_ranks(source.path))
    rows = trainer.per_device_train_batch_size * trainer.gradient_accumulation_steps * ranks
    model = {f"model.{name}": value for name, value in state.model.model_dump().items()}
    if first_weights.folder_of(state.model):
        model["model.init_from"] = None
    return config.changed({
        **model,
        "objective": config.trained_objective,
        "model.pad_token_id": tokenizer.pad_id,
        "tokenizer.path": str(out.absolute() / "checkpoints" / str(step) / "tokenizer"),
        "tokenizer.train": None,
        "trainer.output_dir": str(out.absolute()),
        "trainer.overwrite_output_dir": False,
        "trainer.resume_from_checkpoint": None,
        "trainer.global_batch_size": trainer.global_batch_size or rows,
    })  # fmt: skip


def _num_ranks(folder: Path) -> int:
    return max(1, len(list(folder.glob("random_states_*.pkl"))))


def _trainer_state(source: Source, state: ModelState, step: int) -> dict[str, Any]:
    counters = TrainState(
        step=step, tokens=int(source.counters.get("tokens") or 0), window=TASKS["pretraining"].empty_sums()
    )
    world_size = int(source.counters.get("world_size") or _num_ranks(source.path))
    updates = source.counters.get("optimizer_steps")
    return {
        **trainer_state(counters, data_fingerprint=None, world_size=world_size),  # its tokens are not known
        "optimizer_steps": int((step if updates is None else updates) if state.moments else 0),
    }


def _zeros(shapes: dict[str, Shape]) -> dict[str, Stored]:
    return {name: Derived(shape, partial(torch.zeros, shape)) for name, shape in shapes.items()}


def _write(path: Path, tensors: dict[str, Stored]) -> None:
    write_file(path, tensors, {name: tensor.spec for name, tensor in tensors.items()})


def _not_carried(source: Source, has_moments: bool) -> list[str]:
    folder = source.path if source.path.is_dir() else source.path.parent
    found = {pattern: sorted(p.name for p in folder.glob(pattern)) for pattern in _NOT_CARRIED}
    listed = [f"{', '.join(names)}: {_NOT_CARRIED[pattern]}" for pattern, names in found.items() if names]
    if source.format == annotated.FORMAT:
        listed = [*_ANNOTATED]
        if "step" not in source.counters:
            listed = ["the step: it was saved without data_state, so its weights become a run at step 0"]
        if not source.moments:
            listed.append("moments of the optimizer: there are none with this checkpoint; they begin at zero")
    if source.moments and not has_moments:
        listed.append("moments of the optimizer: they are another one's than the config's; they begin at zero")
    return [*listed, "which text was trained on: the next steps read the rows that the config gives for their numbers"]
