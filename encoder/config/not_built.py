"""Names of features that are not built yet: keys, sections and values that are known, and refused with a sentence.

Configs of NeoBERT, and all that `enc` wrote while these keys were part of the schema, have them with defaults that ask
for nothing. Those are dropped in silence; any other value is a problem.
"""

from typing import Any

from enc.encoder.config.yaml_source import Problem, Source, get_key, remove_key
from enc.encoder.section import yes_no

_GLUE, _CONTRASTIVE, _MTEB = "GLUE fine-tuning", "contrastive training", "MTEB evaluation"

# Feature -> {key: the default that it had}.
KEYS: dict[str, dict[str, Any]] = {
    _GLUE: {
        "glue.task_name": "cola",
        "glue.num_labels": 2,
        "glue.max_seq_length": 128,
        "glue.pretrained_model_path": None,
        "glue.pretrained_checkpoint_dir": None,
        "glue.pretrained_checkpoint": None,
        "glue.allow_random_weights": False,
        "glue.classifier_dropout": 0.1,
        "glue.classifier_init_range": 0.02,
        "glue.transfer_from_task": False,
        "glue.num_workers": 4,
        "glue.preprocessing_num_proc": 4,
        "model.pretrained_model_path": None,
        "model.pretrained_checkpoint_dir": None,
        "model.pretrained_checkpoint": None,
        "model.allow_random_weights": False,
        "model.classifier_dropout": 0.1,
        "trainer.num_train_epochs": 3,
        "trainer.early_stopping": 0,
    },
    _CONTRASTIVE: {
        "contrastive.temperature": 0.05,
        "contrastive.pooling": "avg",
        "contrastive.loss_type": "simcse",
        "contrastive.hard_negative_weight": 0.0,
        "contrastive.pretraining_prob": 0.3,
        "contrastive.pretrained_checkpoint_dir": None,
        "contrastive.pretrained_checkpoint": None,
        "contrastive.allow_random_weights": False,
        "dataset.pretraining_prob": 0.3,
        "dataset.load_all_from_disk": False,
        "dataset.force_redownload": False,
        "dataset.min_length": 5,
        "dataset.alpha": 1.0,
        "trainer.dataloader_num_workers": 0,
    },
    _MTEB: {
        "mteb.task_type": "all",
        "mteb.batch_size": 32,
        "mteb.pooling": "mean",
        "mteb.overwrite_results": False,
        "mteb_task_type": "all",
        "mteb_batch_size": 32,
        "mteb_pooling": "mean",
        "mteb_overwrite_results": False,
    },
    "MuonClip": {"optimizer.muon_config": None},
    "choosing a best model": {"trainer.load_best_model_at_end": False},
    "starting from a hub model": {"model.from_hub": False},
    "starting from another run's weights": {"pretrained_checkpoint": "latest"},
    "streaming": {"dataset.streaming": False},
}
SECTIONS = {"glue": _GLUE, "contrastive": _CONTRASTIVE, "mteb": _MTEB}
# Key -> {value: feature}.
VALUES = {
    "task": {"glue": _GLUE, "contrastive": _CONTRASTIVE, "mteb": _MTEB},
    "optimizer.name": {"muonclip": "MuonClip"},
    "trainer.eval_strategy": {"epoch": "evaluating by epochs"},
    "trainer.save_strategy": {"epoch": "saving by epochs"},
}


def top_level_names() -> set[str]:
    """Return the names above that a config may have without a section."""
    return {*SECTIONS, *(key for keys in KEYS.values() for key in keys if "." not in key)}


def take_out_not_built(source: Source) -> None:
    """Remove the names above from the raw values; what asks for a feature becomes a problem."""
    for feature, keys in KEYS.items():
        for key, default in keys.items():
            if get_key(source.tree, key)[0]:
                value = remove_key(source.tree, key)
                if yes_no(value) != default:
                    _refuse(source, key, value, feature, f"leave it at {default!r}")
    for section, feature in SECTIONS.items():
        rest = source.tree.pop(section, {})
        unknown = {f"{section}.{name}": rest[name] for name in rest} if isinstance(rest, dict) else {section: rest}
        for key, value in unknown.items():
            _refuse(source, key, value, feature, "leave it out")
    for key, features in VALUES.items():
        value = get_key(source.tree, key)[1]
        if isinstance(value, str) and value in features:
            _refuse(source, key, value, features[value], "use another value of `enc config schema`")


def _refuse(source: Source, key: str, value: Any, feature: str, instead: str) -> None:
    text = f"is {value!r}, but {feature} is not built yet; {instead}"
    source.problems.append(Problem(key, text, source.place(key)))
