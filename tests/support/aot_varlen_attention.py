"""What ``tests/support/aot.py`` compiles of attention: every cut of its three kernels, with and without each rule."""

from collections.abc import Callable, Iterator

import torch

from enc.kernels import varlen_attention_triton as launchers
from enc.kernels.attention_rules import Rules

TOKENS, DOCUMENTS, HEADS = 65_536, 256, 12
FEATURES = {
    "largest score": {"max_logits": True},
    "dropout": {"dropout": True},
    "window": {"window": 128, "positions": True},
    "bias": {"bias": True},
    "MPNet": {"bias": True, "stages": True, "positions": True, "dropout": True},
}
DIMS = {torch.bfloat16: (32, 64, 128), torch.float32: (64,)}


def launches(device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the name of each case and what launches its kernels on tensors of the device."""
    for dtype, dims in DIMS.items():
        for dim in dims:
            for name, features in FEATURES.items():
                yield f"{str(dtype).removeprefix('torch.')} {dim} {name}", _case(device, dtype, dim, **features)


def _case(
    device: torch.device,
    dtype: torch.dtype,
    dim: int,
    *,
    bias: bool = False,
    stages: bool = False,
    positions: bool = False,
    dropout: bool = False,
    max_logits: bool = False,
    window: int | None = None,
) -> Callable[[], object]:
    def integers(count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.int32, device=device)

    def launch() -> object:
        q, k, v = torch.empty(TOKENS, HEADS, 3, dim, dtype=dtype, device=device).unbind(2)
        by_token = (integers(TOKENS) if given else None for given in (positions, positions, stages, stages))
        rules = Rules(
            integers(DOCUMENTS + 1), None, *by_token, None, 0.125, 0.1 * dropout, window, 128 * bias, max_logits
        )
        table = torch.empty(32, HEADS, device=device) if bias else None
        seed = torch.empty(1, dtype=torch.int64, device=device) if dropout else None
        out, lse, _ = launchers.forward(q, k, v, table, seed, rules)
        return launchers.backward(torch.empty_like(out), out, lse, q, k, v, table, seed, rules)

    return launch
