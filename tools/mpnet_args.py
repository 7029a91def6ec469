"""The command line of an annotated-mpnet training, as its checkpoints keep it, in the keys of a run config."""

from typing import Any

from enc.encoder.data.tokenizer import EncoderTokenizer

_KEYS = {
    "encoder_layers": "model.num_hidden_layers",
    "encoder_embed_dim": "model.hidden_size",
    "encoder_ffn_dim": "model.intermediate_size",
    "encoder_attention_heads": "model.num_attention_heads",
    "dropout": "model.dropout_prob",
    "attention_dropout": "model.attention_dropout_prob",
    "activation_dropout": "model.activation_dropout_prob",
    "max_positions": "model.max_position_embeddings",
    "relative_attention_num_buckets": "model.relative_attention_num_buckets",
    "relative_attention_max_distance": "model.relative_attention_max_distance",
    "activation_fn": "model.hidden_act",
    "normalize_before": "model.normalize_before",
    "max_tokens": "dataset.max_seq_length",
    "num_workers": "dataset.num_workers",
    "lr": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "adam_eps": "optimizer.eps",
    "total_updates": "trainer.max_steps",
    "warmup_updates": "scheduler.warmup_steps",
    "power": "scheduler.power",
    "batch_size": "trainer.per_device_train_batch_size",
    "update_freq": "trainer.gradient_accumulation_steps",
    "clip_grad_norm": "trainer.gradient_clipping",
    "gradient_checkpointing": "trainer.gradient_checkpointing",
    "logging_steps": "trainer.logging_steps",
    "compile": "trainer.torch_compile",
    "seed": "seed",
    "wandb": "wandb.enabled",
    "wandb_project": "wandb.project",
    "wandb_name": "wandb.name",
}
_OF_HUB = {"dataset_name": "dataset.name", "text_field": "dataset.text_column", "eval_samples": "dataset.eval_samples",
           "min_text_length": "dataset.min_text_length"}  # fmt: skip
_POSITIVE = ("dataset.eval_samples", "dataset.min_text_length")  # 0 turns them off there, null does here
_FEW_CONTINUATIONS = 100  # with fewer tokens that begin with ## annotated-mpnet masks tokens, not words


def run_keys(args: dict[str, Any], tokenizer: EncoderTokenizer) -> dict[str, Any]:
    """Return the dotted keys that a training's args stand for; what they do not say is left out.

    Text in files is not among them: their paths are of another machine or working directory.
    """
    table = {**_KEYS, **(_OF_HUB if args.get("dataset_name") else {})}
    keys = {key: args[name] for name, key in table.items() if args.get(name) is not None}
    for key in _POSITIVE:
        if keys.get(key) == 0:
            del keys[key]
    words = sum(token.startswith("##") for token in tokenizer.tokenizer.get_vocab())
    fixed = {
        "model.type": "mpnet",
        "optimizer.name": "adamw",
        "optimizer.decay_embeddings": True,
        "scheduler.name": "polynomial_decay",
        "datacollator.whole_word": words >= _FEW_CONTINUATIONS,
    }
    return {**fixed, **keys, **_schedule(args), **_intervals(args)}


def _schedule(args: dict[str, Any]) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    if args.get("beta1") is not None and args.get("beta2") is not None:
        keys["optimizer.betas"] = [args["beta1"], args["beta2"]]
    if args.get("lr") and args.get("end_learning_rate") is not None:
        keys["scheduler.final_lr_ratio"] = args["end_learning_rate"] / args["lr"]
    if args.get("total_updates") is not None:
        keys["scheduler.total_steps"] = args["total_updates"]
        if args.get("warmup_updates") is None:
            keys["scheduler.warmup_steps"] = round(0.1 * args["total_updates"])
    return keys


def _intervals(args: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of saving and evaluation; -1 and 0 have meanings of their own there."""
    save, keep = args.get("checkpoint_interval"), args.get("keep_checkpoints")
    keys: dict[str, Any] = {}
    if save and save > 0:
        keys["trainer.save_steps"] = save
    evaluate = args.get("eval_interval_steps") or keys.get("trainer.save_steps", 5000)
    keys["trainer.eval_steps"] = evaluate if evaluate > 0 else args.get("total_updates", 5000)
    if keep is not None:
        keys["trainer.save_total_limit"] = keep if keep > 0 else None
    return keys
