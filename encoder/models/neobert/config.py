"""The config section `model` with `type: neobert`."""

from typing import Literal

from enc.encoder.models.config import ModelConfig
from enc.encoder.section import Bool, PositiveFloat, Probability


class NeoBertConfig(ModelConfig):
    """NeoBERT (`model.type: neobert`)."""

    rope: Bool = True
    """Rotary positions; `false` uses a learned position table."""
    rms_norm: Bool = True
    """RMSNorm; `false` uses LayerNorm."""
    hidden_act: Literal["swiglu", "gelu"] = "swiglu"
    """Feed-forward kind."""
    dropout_prob: Probability = 0.0
    """Dropout after attention, after the feed-forward and inside attention."""
    embedding_init_range: PositiveFloat = 0.02
    """Embeddings start uniform in +- this."""
    decoder_init_range: PositiveFloat = 0.02
    """Linear layers start uniform in +- this."""
    classifier_init_range: PositiveFloat = 0.02
    """Standard deviation of a classification head's first weights; written into exported configs."""
    tie_word_embeddings: Bool = True
    """Use the embedding as the output matrix. Always untied with `ngpt`."""
    decoder_bias: Bool = False
    """Give an untied output matrix a bias, as the first published NeoBERT has."""
    final_logit_softcapping: PositiveFloat | None = None
    """Bend logits into +- this, c tanh(logit / c), as Gemma 2 does."""
    ngpt: Bool = False
    """Normalised transformer: unit-length hidden states instead of norms."""
    base_scale: PositiveFloat = 960**-0.5
    """Scale of the nGPT parameters' raw values."""
