"""Which tensors an optimizer keeps for a parameter, by name and shape (no torch).

Only the optimizer knows what its tensors mean. All others go by their names and shapes: engines gather and load them,
checkpoints store them, sizes count them, importers and converters look for them.

    section `optimizer`, parameters ─state_spec─▶ StateSpec ─tensors(shapes of weights)─▶ {name: shape} of the state

A weight goes under its parameter's name, what is kept for it under `<kind>.<parameter>`, as `exp_avg.decoder.weight`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

from enc.encoder.models.architecture import Parameter, Shape
from enc.encoder.optim.config import OptimizerConfig


@dataclass(frozen=True)
class Kept:
    """What an optimizer keeps for one parameter: fp32 tensors of the parameter's own shape, zero before any update.

    It may differ between parameters, but not within a group of the optimizer: ZeRO makes one flat tensor of a group.
    """

    kinds: tuple[str, ...]  # without a dot
    counts_steps: bool = True  # as a tensor `step`, which every update raises by one


@dataclass(frozen=True)
class StateSpec:
    """What one optimizer keeps, for every parameter."""

    rule: Callable[[str], Kept]
    """What is kept for the parameter of a name."""

    def state_of(self, name: str, shape: Shape) -> dict[str, Shape]:
        """Return the tensors that are kept for a parameter: {kind: shape}."""
        return dict.fromkeys(self.rule(name).kinds, shape)

    def counts_steps(self, name: str) -> bool:
        """Tell whether updates of a parameter are counted, in a tensor `step` of its state."""
        return self.rule(name).counts_steps

    def kept(self, shapes: dict[str, Shape]) -> dict[str, Shape]:
        """Return the tensors that are kept for weights of these shapes: {`<kind>.<parameter>`: shape}."""
        return {
            f"{kind}.{name}": kind_shape
            for name, shape in shapes.items()
            for kind, kind_shape in self.state_of(name, shape).items()
        }

    def tensors(self, shapes: dict[str, Shape]) -> dict[str, Shape]:
        """Return the whole trained state of weights of these shapes, weights first, in the order engines go through."""
        return {**shapes, **self.kept(shapes)}


def state_spec(optimizer: OptimizerConfig, parameters: Mapping[str, Parameter]) -> StateSpec:
    """Return what the optimizer of a config section keeps for parameters, which are given by name."""
    rule = _RULES[optimizer.name]
    return StateSpec(lambda name: rule(optimizer, parameters[name]))


def split_kind(name: str) -> tuple[str, str]:
    """Return (kind, parameter) of a tensor of the state; the kind of a weight is ''."""
    kind, _, parameter = name.partition(".")
    return (kind, parameter) if kind in KINDS and parameter else ("", name)


def num_bytes(shapes: dict[str, Shape]) -> int:
    """Return the bytes of tensors in fp32."""
    return 4 * sum(prod(shape) for shape in shapes.values())


# --- by optimizer ----------------------------------------------------------------------------------------------------

ADAM = Kept(("exp_avg", "exp_avg_sq"))  # torch's names, which every program that trains with its AdamW stores
KINDS = ADAM.kinds
"""The kinds of all optimizers here, by which readers of any format know what is no weight."""


ADAM_STATE = StateSpec(lambda _name: ADAM)
"""That of a checkpoint of another program, whose parameters may have any names."""


def _adam(_config: OptimizerConfig, _parameter: Parameter) -> Kept:
    return ADAM


_RULES: dict[str, Callable[[OptimizerConfig, Parameter], Kept]] = {"adamw": _adam, "adam": _adam}
