"""Cases of the tests of the loss, on any device, and what one writes without its kernel."""

import torch
import torch.nn.functional as F

from enc.kernels.masked_ce import MaskedCEOutput


def inputs(positions: int, hidden: int, columns: int, valid: int, with_bias: bool, dtype=torch.float32, seed: int = 0):
    """Return (x, W, b or None) as leaves, and targets of which about one in four is ignored."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(positions, hidden), (columns, hidden)] + ([(columns,)] if with_bias else [])
    leaves = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]
    targets = torch.randint(0, valid, (positions,), generator=generator)
    targets[torch.rand(positions, generator=generator) < 0.25] = -100
    return [*leaves, *[None] * (3 - len(leaves))], targets


def run(function, leaves, targets, valid=None, scale=0.3, **terms) -> tuple[torch.Tensor, ...]:
    """Return loss, logsumexp, number of correct positions and the gradients."""
    found = function(*leaves, targets, valid, **terms)
    return *found, *torch.autograd.grad(found.loss * scale, [x for x in leaves if x is not None])


def in_fp64(leaves):
    return [x if x is None else x.detach().double().requires_grad_() for x in leaves]


TERMS = {"z_loss": 1e-2, "label_smoothing": 0.1, "softcap": 5.0}


def plain(hidden, weight, bias, targets, valid):
    """What one writes without this kernel: gather, F.linear, F.cross_entropy."""
    positions = (targets != -100).nonzero()[:, 0]
    logits = F.linear(hidden[positions], weight, bias)[:, :valid].float()
    loss = F.cross_entropy(logits, targets[positions], reduction="sum")
    return MaskedCEOutput(loss, loss.new_zeros(()), (logits.argmax(-1) == targets[positions]).sum())
