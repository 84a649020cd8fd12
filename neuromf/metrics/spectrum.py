"""Power spectra, radial and along each axis: whether generated volumes carry detail at the scales real ones do.

Frequencies are in cycles/mm, so sets of different voxel sizes share an axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from neuromf.metrics.statistics import Estimate, bootstrap_of_means

Window = Literal["none", "hann"]
AXES = ("left-right", "back-front", "bottom-top")
"""Of RAS+ volumes (I, J, K)."""


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
    return _radial(_energy(_batch(volumes), window), spacing_mm)


def _radial(energy: Tensor, spacing_mm: Sequence[float]) -> Spectrum:
    """`radial_power_spectrum` of |DFT|^2 (B, I, J, K)."""
    size = energy.shape[1:]
    energy = energy / energy[0].numel()
    radius = _radius(size, spacing_mm)
    extent = max(n * step for n, step in zip(size, spacing_mm, strict=True))
    shells = int(_nyquist(spacing_mm) * extent + 1e-9)
    shell = (radius * extent).round().long().clamp(max=shells + 1).flatten()
    counts = torch.bincount(shell, minlength=shells + 2).double()
    sums = torch.zeros(len(energy), shells + 2, dtype=torch.float64)
    sums.index_add_(1, shell, energy.flatten(1))
    kept = slice(1, shells + 1)
    frequency = torch.arange(1, shells + 1, dtype=torch.float64) / extent
    filled = counts[kept] > 0  # long thin grids leave no shell empty; very flat ones might
    return Spectrum(frequency[filled], (sums[:, kept] / counts[kept].clamp(min=1))[:, filled])


def axis_power_spectra(
    volumes: Tensor, spacing_mm: Sequence[float], *, window: Window = "none"
) -> tuple[Spectrum, Spectrum, Spectrum]:
    """The power of `radial_power_spectrum` by the frequency along one axis: mean over a plane of coefficients.

    P_a(k / L_a) is the mean of |DFT|^2 / (I J K) over the two planes f_a = +-k / L_a, with L_a the field of view along
    axis a in mm, k = 1 ... n_a / 2. White noise of variance s^2 has power s^2 everywhere. Slices that do not fit
    together, or blur along one axis alone, show here and nearly vanish in the mean over directions.

    Args:
        volumes: (B, 1, I, J, K) or (I, J, K), RAS+: the spectra are left-right, back-front, bottom-top.
        spacing_mm: voxel size per axis.
        window: as in `radial_power_spectrum`.
    """
    return _along_axes(_energy(_batch(volumes), window), spacing_mm)


def _along_axes(energy: Tensor, spacing_mm: Sequence[float]) -> tuple[Spectrum, Spectrum, Spectrum]:
    """`axis_power_spectra` of |DFT|^2 (B, I, J, K)."""
    energy = energy / energy[0].numel()
    found = []
    for axis, step in enumerate(spacing_mm):
        n = energy.shape[axis + 1]
        lines = energy.mean([other + 1 for other in range(3) if other != axis])
        half = n // 2
        both = (lines[:, 1 : half + 1] + lines.flip(1)[:, :half]) / 2  # f and -f; the Nyquist's own twin is itself
        found.append(Spectrum(torch.arange(1, half + 1, dtype=torch.float64) / (n * step), both))
    return found[0], found[1], found[2]


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
    return _high_share(_energy(_batch(volumes), window), spacing_mm, cutoff)


def _high_share(energy: Tensor, spacing_mm: Sequence[float], cutoff: float | None) -> Tensor:
    """`high_frequency_energy_ratio` of |DFT|^2 (B, I, J, K)."""
    cutoff = _nyquist(spacing_mm) / 2 if cutoff is None else cutoff
    high = (_radius(energy.shape[1:], spacing_mm) >= cutoff - 1e-12).flatten()
    energy = energy.flatten(1)
    return energy[:, high].sum(1) / energy.sum(1).clamp(min=torch.finfo(torch.float64).tiny)


class Spectra(NamedTuple):
    """All of a batch: radial, along the axes, and the share of energy at high frequencies (B,)."""

    radial: Spectrum
    axes: tuple[Spectrum, Spectrum, Spectrum]
    high_share: Tensor


def spectra(volumes: Tensor, spacing_mm: Sequence[float], *, window: Window = "none") -> Spectra:
    """`radial_power_spectrum`, `axis_power_spectra` and `high_frequency_energy_ratio` from one transform."""
    energy = _energy(_batch(volumes), window)
    return Spectra(_radial(energy, spacing_mm), _along_axes(energy, spacing_mm), _high_share(energy, spacing_mm, None))


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
