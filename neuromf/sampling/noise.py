"""Noise that depends on a key and on nothing else: not on the batch, the device count, or a restart."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def keyed_seed(*key: int | str) -> int:
    """A 63-bit seed that is a function of `key` alone (SHA-256 of its parts).

    Example:
        >>> keyed_seed("update", 0, 7) == keyed_seed("update", 0, 7) != keyed_seed("update", 0, 8)
        True
    """
    digest = hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def keyed_generator(*key: int | str, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator whose stream is a function of `key` alone.

    Example:
        >>> keyed_generator("sample", 0, 7).initial_seed() == keyed_generator("sample", 0, 7).initial_seed()
        True
    """
    return torch.Generator(device=device).manual_seed(keyed_seed(*key))


def sample_noise(seed: int, index: int, shape: Sequence[int]) -> Tensor:
    """The noise of generated sample `index`, eps ~ N(0, I), of shape (C, I, J, K), float32.

    Always drawn on the CPU, one stream per (seed, index), so that sample 17 is bit for bit the same in
    any batch, on any number of devices, after any restart.
    """
    return torch.randn(*shape, generator=keyed_generator("sample", seed, index))


def noise_batch(seed: int, indices: Sequence[int], shape: Sequence[int]) -> Tensor:
    """`sample_noise` of several indices stacked, (B, C, I, J, K)."""
    return torch.stack([sample_noise(seed, index, shape) for index in indices])
