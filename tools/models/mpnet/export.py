"""MPNet as a model of transformers: its own MPNet where that computes the same, else with a modelling file."""

from pathlib import Path
from typing import Any

from transformers import MPNetConfig, MPNetForMaskedLM, PreTrainedConfig

from enc.encoder.data.tokenizer import EncoderTokenizer
from enc.encoder.models.mpnet import modeling_mpnet
from enc.encoder.models.mpnet.architecture import POSITION_OFFSET
from enc.encoder.models.mpnet.config import MpnetConfig
from enc.encoder.models.mpnet.model import MpnetForMaskedLM
from enc.encoder.models.mpnet.modeling_mpnet import EncMPNetConfig, EncMPNetForMaskedLM
from enc.encoder.models.mpnet.pretrained import HF_BUCKETS, HF_MAX_DISTANCE, HF_PAD_ID
from enc.tools.models.export_target import ExportTarget, auto_map, modeling_files

_COPIED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "hidden_act",
    "normalize_before",
    "norm_eps",
    "dropout_prob",
    "attention_dropout_prob",
    "activation_dropout_prob",
    "initializer_range",
)


def mpnet_target(config: MpnetConfig, tokenizer_dir: Path, num_tokens: int) -> ExportTarget:
    """Return an MPNet for transformers, its own class where that computes the same."""
    tokenizer = EncoderTokenizer.load(tokenizer_dir)
    reasons = why_not_native(config, tokenizer.pad_id)
    ids = {"pad_token_id": tokenizer.pad_id, "bos_token_id": tokenizer.cls_id, "eos_token_id": tokenizer.sep_id}
    native_form = "Written as transformers' own MPNetForMaskedLM."
    own_form = (
        "Written with its own code, modeling_mpnet.py: it loads with trust_remote_code=True. transformers' MPNet would "
        f"not compute the same: {'; '.join(reasons)}."
    )
    return ExportTarget(
        config=own_config(config, num_tokens, ids) if reasons else native_config(config, num_tokens, ids),
        model_class=EncMPNetForMaskedLM if reasons else MPNetForMaskedLM,
        trained=MpnetForMaskedLM(config, num_tokens),
        vocabulary=("mpnet.embeddings.word_embeddings.weight", "lm_head.bias"),
        longest=config.max_position_embeddings,
        tag="mpnet",
        architecture={
            "Layers": str(config.num_hidden_layers),
            "Hidden size": str(config.hidden_size),
            "Attention heads": str(config.num_attention_heads),
            "Feed-forward": f"{config.hidden_act}, intermediate size {config.intermediate_size}",
            "Positions": f"learned, up to {config.max_position_embeddings}; relative bias of {config.num_buckets} "
            f"buckets up to a distance of {config.max_distance}",
            "Norm": f"LayerNorm {'before' if config.normalize_before else 'after'} attention and feed-forward",
            "Vocabulary": f"{num_tokens:,} tokens, tied head",
        },
        code=modeling_files(modeling_mpnet) if reasons else (),
        unseen_ids=() if reasons else (tokenizer.pad_id,),
        form=own_form if reasons else native_form,
    )


def why_not_native(config: MpnetConfig, pad_id: int) -> list[str]:
    """Return what transformers' MPNet cannot represent of a model; nothing when it can."""
    buckets = (config.num_buckets, config.max_distance)
    found = {
        "it normalises after attention and feed-forward, never before": config.normalize_before,
        f"its head has gelu, never {config.hidden_act}": config.hidden_act != "gelu",
        f"its relative bias has {HF_BUCKETS} buckets up to a distance of {HF_MAX_DISTANCE}, never {buckets[0]} up to "
        f"{buckets[1]}": buckets != (HF_BUCKETS, HF_MAX_DISTANCE),
        f"it pads with id {HF_PAD_ID}, never {pad_id}": pad_id != HF_PAD_ID,
    }
    return [reason for reason, holds in found.items() if holds]


def native_config(config: MpnetConfig, num_tokens: int, ids: dict[str, Any]) -> PreTrainedConfig:
    """Return the config of transformers' MPNet.

    It has a single rate for dropout outside of attention, at the places of `dropout_prob`; inside of the feed-forward
    it has none.
    """
    return MPNetConfig(
        vocab_size=num_tokens,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        hidden_act=config.hidden_act,
        hidden_dropout_prob=config.dropout_prob,
        attention_probs_dropout_prob=config.attention_dropout_prob,
        max_position_embeddings=config.max_position_embeddings + POSITION_OFFSET,
        initializer_range=config.initializer_range,
        layer_norm_eps=config.norm_eps,
        relative_attention_num_buckets=config.num_buckets,
        architectures=["MPNetForMaskedLM"],
        **ids,
    )


def own_config(config: MpnetConfig, num_tokens: int, ids: dict[str, Any]) -> EncMPNetConfig:
    """Return the config of the modelling file, with the map that makes the Auto classes find it."""
    return EncMPNetConfig(
        vocab_size=num_tokens,
        relative_attention_num_buckets=config.num_buckets,
        relative_attention_max_distance=config.max_distance,
        architectures=["EncMPNetForMaskedLM"],
        auto_map=auto_map(modeling_mpnet, "EncMPNet"),
        **{name: getattr(config, name) for name in _COPIED},
        **ids,
    )
