"""Names of nested state dicts: which tensor is a weight, which one a moment, of which parameter."""

import re
from collections.abc import Mapping

from enc.encoder.optim.state_spec import KINDS, split_kind
from enc.tools.readers.source import Stored

_CONTAINERS = {"app", "state", "state_dict", "model", "module", "model_state", "model_state_dict"}
_OPTIMIZERS = r"(?:optim|optimizer|opt|optim_state|optimizer_state|optimizer_state_dict)"
_STATE = re.compile(rf"(?:.*\.)?{_OPTIMIZERS}\.state\.(.+)\.({'|'.join(KINDS)}|step)")
_OTHER_STATE = re.compile(rf"(?:app\.|state_dict\.)?{_OPTIMIZERS}\.(?:state|param_groups)\..*")
BUFFERS = re.compile(r".*(?:freqs_cis|freqs_cos|freqs_sin|inv_freq|rope_cache)$")  # of rotary positions


def split_names(
    tensors: Mapping[tuple[str, ...], Stored],
) -> tuple[dict[str, Stored], dict[str, Stored], list[Stored]]:
    """Sort tensors by their paths in a nested state dict into weights, moments and step counts.

    The keys above a parameter's own name, such as `model`, are dropped. A path of one key may have them in it, joined
    by dots; then the moments' names tell how much of a weight's name is the parameter's own.
    """
    weights: dict[str, Stored] = {}
    moments: dict[str, Stored] = {}
    steps: list[Stored] = []
    for path, tensor in tensors.items():
        joined = ".".join(path)
        if match := _STATE.fullmatch(joined):
            if match[2] == "step":
                steps.append(tensor)
            else:
                moments[f"{match[2]}.{match[1]}"] = tensor
        elif split_kind(joined)[0]:
            moments[joined] = tensor
        elif not _OTHER_STATE.fullmatch(joined):
            weights[_weight_name(path)] = tensor
    return _without_prefix(weights, moments), moments, steps


def _weight_name(path: tuple[str, ...]) -> str:
    first = 0
    while first < len(path) - 1 and path[first] in _CONTAINERS:
        first += 1
    return ".".join(path[first:])


def _without_prefix(weights: dict[str, Stored], moments: dict[str, Stored]) -> dict[str, Stored]:
    """Drop what stands before every weight's name but not before the moments' names."""
    parameters = {name.split(".", 1)[1] for name in moments}
    if not parameters or parameters <= weights.keys():
        return weights
    for prefix in ("model.", "module.", "app.model."):
        if all(f"{prefix}{name}" in weights for name in parameters):
            return {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    return weights
