"""Feature vectors of volumes, from the autoencoder the latents were made with: always available offline.

They are called by their own name, "builtin": no distance of them is ever an "FID". Extractors with foreign
weights (Inception, RadImageNet, MedicalNet) are further functions volumes -> (N, D) beside this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

GRID = 2


class _Encoder(Protocol):
    """What is needed of an autoencoder: `encode(volume).mean`."""

    def encode(self, volume: Tensor, /) -> Any: ...


def features(
    volumes: Tensor | np.ndarray | Sequence[np.ndarray],
    encoder: _Encoder,
    *,
    grid: int = GRID,
    batch_size: int = 4,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Descriptor of each volume: mean and spread of every latent channel in each cell of a coarse grid.

    The posterior mean (B, C, i, j, k) is pooled on `grid`^3 cells. Cell means say where tissue is, cell
    standard deviations how much detail there is, so blur, noise, lost anatomy and a collapsed set all move
    it. D = 2 C grid^3: 64 for the 4 channels of the usual autoencoder at grid 2. That is on purpose small:
    a covariance of D dimensions needs N > D volumes, and sets of 64 to 128 must do on a laptop. Measured on
    64 hippocampus crops a side (4 linear channels), a blur of 1 voxel is 7.7 times the real-real Frechet
    distance at grid 2, 3.8 times at grid 3 (D = 216), and halving the variety 8.7 against 4.3 times.

    Args:
        volumes: (N, 1, I, J, K), p0-p99.5 scale; any sequence of (1, I, J, K), read a batch at a time.
        encoder: an `Autoencoder`.
        grid: cells per axis.
        progress: called with (volumes done, volumes in all).

    Returns:
        (N, D) float64 on the CPU: means first, then standard deviations, channel-major.
    """
    rows = []
    done = 0
    for batch in batches(volumes, batch_size):
        with torch.no_grad():
            rows.append(descriptor(encoder.encode(batch.to(device)).mean, grid))
        done += len(batch)
        if progress is not None:
            progress(done, len(volumes))
    return torch.cat(rows)


def descriptor(latent: Tensor, grid: int = GRID) -> Tensor:
    """Pool latents (B, C, i, j, k) to (B, 2 C grid^3) float64 on the CPU: cell means, cell deviations."""
    latent = latent.detach().double().cpu()
    mean = F.adaptive_avg_pool3d(latent, grid)
    variance = F.adaptive_avg_pool3d(latent.square(), grid) - mean.square()
    return torch.cat([mean.flatten(1), variance.clamp(min=0).sqrt().flatten(1)], dim=1)


def batches(volumes: Tensor | np.ndarray | Sequence[np.ndarray], batch_size: int) -> Iterator[Tensor]:
    """Float32 batches (B, 1, I, J, K) of a sequence of (1, I, J, K), in order; only one is in memory."""
    for start in range(0, len(volumes), batch_size):
        items = [as_tensor(volumes[i]) for i in range(start, min(start + batch_size, len(volumes)))]
        yield torch.stack(items).float()


def as_tensor(volume: Tensor | np.ndarray) -> Tensor:
    """A tensor of an array of any strides (torch refuses mirrored views)."""
    return volume if isinstance(volume, Tensor) else torch.from_numpy(np.ascontiguousarray(volume))
