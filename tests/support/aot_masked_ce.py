"""What ``tests/support/aot.py`` compiles of the loss: both methods, every dtype, with and without each term."""

from collections.abc import Callable, Iterator

import torch

from enc.kernels import masked_ce_triton_recompute as recompute
from enc.kernels import masked_ce_triton_store as store
from enc.kernels.masked_ce_torch import Head

POSITIONS, HIDDEN, COLUMNS, CLASSES = 13_107, 768, 30_592, 30_522
CASES = {
    "plain": ({}, False, HIDDEN),
    "bias": ({}, True, HIDDEN),
    "terms": ({"z_loss": 1e-4, "label_smoothing": 0.1, "softcap": 30.0}, True, HIDDEN),
    "odd hidden size": ({}, False, 123),
    "small": ({}, False, 256),
}


def launches(device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the name of each case and what launches its kernels on tensors of the device."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for name, (terms, biased, hidden_size) in CASES.items():
            yield f"{str(dtype).removeprefix('torch.')} {name}", _case(device, dtype, terms, biased, hidden_size)


def _case(
    device: torch.device, dtype: torch.dtype, given: dict[str, float], biased: bool, hidden_size: int
) -> Callable[[], object]:
    def launch() -> None:
        x = torch.empty(POSITIONS, hidden_size, dtype=dtype, device=device)
        weight = torch.empty(COLUMNS, hidden_size, dtype=dtype, device=device)
        bias = torch.empty(COLUMNS, dtype=dtype, device=device) if biased else None
        targets, scale = torch.empty(POSITIONS, dtype=torch.int64, device=device), torch.empty((), device=device)
        terms = given.get("z_loss", 0.0), given.get("label_smoothing", 0.0), given.get("softcap")
        head = Head(x, weight, bias, targets, dtype, CLASSES, *terms)
        for with_grad in (False, True):
            store.forward(head, with_grad)
        store.scale_(torch.empty_like(weight), scale)
        if dtype != torch.float32:  # always stores
            _, lse, _ = recompute.forward(head)
            recompute.backward(head, scale, lse)

    return launch
