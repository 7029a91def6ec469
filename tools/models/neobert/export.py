"""NeoBERT as a model of transformers: always with its modelling file."""

from pathlib import Path

from enc.encoder.errors import UsageError
from enc.encoder.models.neobert import modeling_neobert
from enc.encoder.models.neobert.config import NeoBertConfig
from enc.encoder.models.neobert.model import NeoBertForMaskedLM
from enc.encoder.models.neobert.modeling_neobert import NeoBERTConfig, NeoBERTForMaskedLM
from enc.tools.models.export_target import ExportTarget, auto_map, modeling_files

_COPIED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "hidden_act",
    "rope",
    "rms_norm",
    "norm_eps",
    "dropout_prob",
    "embedding_init_range",
    "decoder_init_range",
    "classifier_init_range",
    "pad_token_id",
    "tie_word_embeddings",
    "decoder_bias",
    "final_logit_softcapping",
)


def neobert_target(config: NeoBertConfig, _tokenizer_dir: Path, num_tokens: int) -> ExportTarget:
    """Return a NeoBERT for transformers. Raises UsageError for an nGPT."""
    if config.ngpt:
        raise UsageError(
            "an nGPT model has no transformers counterpart here; only NeoBERT (model.ngpt: false) exports."
        )
    return ExportTarget(
        config=hf_config(config, num_tokens),
        model_class=NeoBERTForMaskedLM,
        trained=NeoBertForMaskedLM(config, num_tokens),
        vocabulary=("model.encoder.weight", "decoder.weight", "decoder.bias"),
        longest=config.max_position_embeddings,
        tag="neobert",
        architecture={
            "Layers": str(config.num_hidden_layers),
            "Hidden size": str(config.hidden_size),
            "Attention heads": str(config.num_attention_heads),
            "Feed-forward": f"{config.hidden_act}, intermediate size {config.intermediate_size}",
            "Positions": f"{'rotary' if config.rope else 'learned'}, up to {config.max_position_embeddings}",
            "Norm": "RMSNorm" if config.rms_norm else "LayerNorm",
            "Vocabulary": f"{num_tokens:,} tokens, {'tied' if config.tie_word_embeddings else 'untied'} head",
        },
        code=modeling_files(modeling_neobert),
        form="Written with its own code, modeling_neobert.py: it loads with trust_remote_code=True.",
    )


def hf_config(config: NeoBertConfig, num_tokens: int) -> NeoBERTConfig:
    """Return the transformers config of a model, with the map that makes the Auto classes find its code."""
    fields = {name: getattr(config, name) for name in _COPIED}
    return NeoBERTConfig(
        vocab_size=num_tokens,
        architectures=["NeoBERTForMaskedLM"],
        auto_map=auto_map(modeling_neobert, "NeoBERT"),
        **fields,
    )
