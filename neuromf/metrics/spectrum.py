"""Radial power spectra: whether generated volumes carry detail at the scales real ones do.

Frequencies are in cycles/mm, so sets of different voxel sizes share an axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from neuromf.metrics.statistics import Estimate, bootstrap_of_means

Window = Literal["none", "hann"]


class Spectrum(NamedTuple):
    """Shell frequencies (F,) in cycles/mm and mean power per coefficient (B, F), same unit as variance."""

    frequency: Tensor
    power: Tensor


def radial_power_spectrum(volumes: Tensor, spacing_mm: Sequence[float], *, window: Window = "none") -> Spectrum:
    """Mean of |DFT|^2 / (I J K) over shells of equal frequency |f| = sqrt(f_i^2 + f_j^2 + f_k^2).

    The mean over space is removed first. Shell k covers |f| within half a step of k / L, with L the longest
    field of view in mm; shells run from k = 1 to the smallest Nyquist frequency, 0.5 / max(spacing), beyond
    which not all directions are sampled. White noise of variance s^2 has power s^2 in every shell; a plane
    wave all of its power in the shell of its frequency.

    Args:
        volumes: (B, 1, I, J, K) or (I, J, K).
        spacing_mm: voxel size per axis.
        window: `hann` tapers each axis to zero at the border and keeps the power of white noise: for
            crops, whose cut edges would otherwise fill the high frequencies.
    """
    volumes = _batch(volumes)
    energy = _energy(volumes, window) / volumes[0].numel()
    radius = _radius(volumes.shape[2:], spacing_mm)
    extent = max(n * step for n, step in zip(volumes.shape[2:], spacing_mm, strict=True))
    shells = int(_nyquist(spacing_mm) * extent + 1e-9)
    shell = (radius * extent).round().long().clamp(max=shells + 1).flatten()
    counts = torch.bincount(shell, minlength=shells + 2).double()
    sums = torch.zeros(len(volumes), shells + 2, dtype=torch.float64)
    sums.index_add_(1, shell, energy.flatten(1))
    kept = slice(1, shells + 1)
    frequency = torch.arange(1, shells + 1, dtype=torch.float64) / extent
    filled = counts[kept] > 0  # long thin grids leave no shell empty; very flat ones might
    return Spectrum(frequency[filled], (sums[:, kept] / counts[kept].clamp(min=1))[:, filled])


def high_frequency_energy_ratio(
    volumes: Tensor,
    spacing_mm: Sequence[float],
    *,
    cutoff: float | None = None,
    window: Window = "none",
) -> Tensor:
    """Share of a volume's energy at and above a cutoff frequency, from 0 to 1, (B,).

    sum over |f| >= cutoff of |DFT|^2, divided by the sum over all f except 0 (the mean is removed). Blur
    lowers it, noise raises it.

    Args:
        volumes: (B, 1, I, J, K) or (I, J, K).
        spacing_mm: voxel size per axis.
        cutoff: cycles/mm; half the smallest Nyquist frequency, 0.25 / max(spacing), when None.
        window: as in `radial_power_spectrum`.
    """
    volumes = _batch(volumes)
    cutoff = _nyquist(spacing_mm) / 2 if cutoff is None else cutoff
    energy = _energy(volumes, window).flatten(1)
    high = (_radius(volumes.shape[2:], spacing_mm) >= cutoff - 1e-12).flatten()
    return energy[:, high].sum(1) / energy.sum(1).clamp(min=torch.finfo(torch.float64).tiny)


def spectrum_distance(power_a: Tensor, power_b: Tensor, *, seed: int = 0, resamples: int = 1000) -> Estimate:
    """Mean over shells of |log10(P_a / P_b)|, P the mean spectrum of a set, with a bootstrap interval.

    0 for equal spectra; 1 means ten times too much or too little power on average over frequency.

    Args:
        power_a: (N, F) from `radial_power_spectrum`.
        power_b: (M, F), the same shells.
    """

    def distance(a: Tensor, b: Tensor) -> Tensor:
        tiny = torch.finfo(torch.float64).tiny
        return (a.clamp(min=tiny).log10() - b.clamp(min=tiny).log10()).abs().mean(1)

    return bootstrap_of_means(power_a, power_b, function=distance, seed=seed, resamples=resamples)


def _energy(volumes: Tensor, window: Window) -> Tensor:
    """|DFT|^2 (B, I, J, K) float64 of the volumes without their (windowed) mean."""
    x = volumes[:, 0].double()
    if window == "hann":
        taper = torch.ones((), dtype=torch.float64)
        for n in x.shape[1:]:
            line = torch.hann_window(n, periodic=True, dtype=torch.float64)
            taper = taper[..., None] * (line / line.square().mean().sqrt())
        # The weighted mean: so that the taper itself, a bump of low frequency, does not appear.
        mean = (x * taper).sum((1, 2, 3), keepdim=True) / taper.sum()
        x = (x - mean) * taper
    else:
        x = x - x.mean((1, 2, 3), keepdim=True)
    energy = torch.fft.fftn(x, dim=(1, 2, 3)).abs().square()
    energy[:, 0, 0, 0] = 0.0
    return energy


def _radius(size: Sequence[int], spacing_mm: Sequence[float]) -> Tensor:
    """|f| in cycles/mm of every DFT coefficient, (I, J, K)."""
    axes = [torch.fft.fftfreq(n, d=step).double() for n, step in zip(size, spacing_mm, strict=True)]
    i, j, k = torch.meshgrid(*axes, indexing="ij")
    return (i**2 + j**2 + k**2).sqrt()


def _nyquist(spacing_mm: Sequence[float]) -> float:
    return 0.5 / max(spacing_mm)


def _batch(volumes: Tensor) -> Tensor:
    return volumes[None, None] if volumes.ndim == 3 else volumes
