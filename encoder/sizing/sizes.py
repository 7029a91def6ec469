"""Parameters, floating-point operations and bytes of a model, from its config alone (no torch).

Legend: H hidden size, L layers, V vocabulary rows, P tokens that are predicted.
"""

from enc.encoder.config.schema import RunConfig
from enc.encoder.models.config import ModelConfig
from enc.encoder.models.registry import architecture_of
from enc.encoder.optim.state_spec import num_bytes, state_spec


def feed_forward_width(model: ModelConfig) -> int:
    """Return the width of the feed-forward as it is computed."""
    return architecture_of(model).feed_forward_width(model)


def block_parameters(model: ModelConfig) -> int:
    """Return the matrix parameters of one transformer block, all of them (norms, biases and scales not counted)."""
    return architecture_of(model).block_parameters(model)[1]


def parameter_shapes(config: RunConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every trained parameter under its name in the model; a tied head has none of its own."""
    return {name: parameter.shape for name, parameter in config.parameters.items()}


def num_parameters(config: RunConfig) -> int:
    """Return the number of trained parameters, every one counted once."""
    return sum(parameter.size for parameter in config.parameters.values())


def states_per_token(config: RunConfig) -> tuple[float, float]:
    """Return how many hidden states, and how many keys of attention, a layer has for each token of text.

    A permuted document has a query for each of its P predicted tokens, `mpnet` a placeholder too, which is a key.
    """
    predicted = config.datacollator.mlm_probability
    match config.trained_objective:
        case "mpnet":
            return 1 + 2 * predicted, 1 + predicted
        case "plm":
            return 1 + predicted, 1.0
    return 1.0, 1.0


def training_flops(
    model: ModelConfig, num_states: int, num_keys: int, num_pairs: int, num_labels: int, whole_last_layer: bool = False
) -> int:
    """Return the operations of forward and backward: 6 a matrix parameter and state, attention over real documents.

    Keys and values are made for the keys, all else for every state; `num_pairs` is the sum over documents of states
    times keys. The output matrix is counted for labels only, and so is what the last layer does for a state beyond its
    key and value, labels spread evenly, unless it is computed whole.
    """
    last = num_states if whole_last_layer else num_labels
    architecture = architecture_of(model)
    block, key_value = architecture.block_parameters(model)[0], 2 * model.hidden_size**2
    layers = model.num_hidden_layers - 1
    matrices = 6 * ((block - key_value) * (layers * num_states + last) + key_value * (layers + 1) * num_keys)
    attention = 12 * model.hidden_size * (layers * num_pairs + num_pairs * last // max(num_states, 1))
    return matrices + attention + 6 * architecture.head_parameters(model) * num_labels


def checkpoint_bytes(config: RunConfig) -> int:
    """Return the size of one checkpoint: weights and what the optimizer keeps, in fp32."""
    return num_bytes(state_spec(config.optimizer, config.parameters).tensors(parameter_shapes(config)))
