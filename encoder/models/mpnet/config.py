"""The config section `model` with `type: mpnet`."""

from typing import Annotated, Literal

from pydantic import Field

from enc.encoder.models.config import ModelConfig
from enc.encoder.section import Bool, Line, PositiveFloat, PositiveInt, Probability


class MpnetConfig(ModelConfig):
    """MPNet (`model.type: mpnet`): learned positions, T5's relative bias shared by all layers, a tied head."""

    type: Literal["neobert", "mpnet"] = "mpnet"
    """Architecture; it decides which other keys this section has."""
    hidden_act: Literal["gelu", "gelu_accurate", "relu", "relu2", "silu", "tanh", "linear"] = "gelu"
    """Activation of the feed-forward and of the head."""
    normalize_before: Bool = False
    """LayerNorm before attention and feed-forward (pre-LN), with one more at the end, instead of after them."""
    dropout_prob: Probability = 0.1
    """Dropout of the embeddings, after attention and after the feed-forward."""
    attention_dropout_prob: Probability = 0.1
    """Dropout of the attention weights."""
    activation_dropout_prob: Probability = 0.1
    """Dropout inside the feed-forward, after the activation."""
    relative_attention_num_buckets: Annotated[int, Field(ge=4)] | None = None
    """Buckets of the relative bias; by default 32 for every 512 positions, at least 32."""
    relative_attention_max_distance: PositiveInt | None = None
    """Distance from which on all share a bucket; by default 128 for every 512 positions, at least 128."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of the first weights."""
    init_from: Line | None = None
    """Hugging Face folder of an MPNet whose weights the run starts from."""

    @property
    def num_buckets(self) -> int:
        """Buckets of the relative bias, with annotated-mpnet's default."""
        return self.relative_attention_num_buckets or _grown(32, self.max_position_embeddings)

    @property
    def max_distance(self) -> int:
        """Distance from which on all share a bucket, with annotated-mpnet's default."""
        return self.relative_attention_max_distance or _grown(128, self.max_position_embeddings)


def _grown(of_512: int, positions: int) -> int:
    return -(-max(of_512, of_512 * positions // 512) // 8) * 8
