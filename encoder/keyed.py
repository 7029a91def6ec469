"""Random draws that depend on a key alone, so that no generator state has to be carried, saved or restored.

A key names the purpose and the index of the draw: ``("mask", epoch, row)``, ``("order", epoch)``, ``("init", name)``.
The same (seed, key) gives the same numbers in every process, on every rank and after every resume.
"""

import hashlib

import numpy as np
import torch


def _digest(seed: int, key: tuple[str | int, ...], num_bytes: int) -> int:
    text = "\x1f".join([str(seed), *map(str, key)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=num_bytes).digest(), "little")


def numpy_rng(seed: int, *key: str | int) -> np.random.Generator:
    """Return a numpy generator (Philox, 128-bit key) for this seed and key."""
    return np.random.Generator(np.random.Philox(key=_digest(seed, key, 16)))


def torch_rng(seed: int, *key: str | int) -> torch.Generator:
    """Return a CPU torch generator for this seed and key."""
    return torch.Generator().manual_seed(_digest(seed, key, 8) % 2**63)


def set_global_seed(seed: int, *key: str | int) -> None:
    """Seed torch's global generators (CPU and accelerators), which dropout draws from."""
    torch.manual_seed(_digest(seed, key, 8) % 2**63)
