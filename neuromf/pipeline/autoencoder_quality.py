"""How well an autoencoder keeps volumes, beside the best linear code of the same rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from neuromf.metrics.similarity import psnr, ssim
from neuromf.models.autoencoder import Autoencoder


@dataclass(frozen=True)
class QualityRow:
    """Mean PSNR (dB) and 3-D SSIM over `n` volumes, clipped to [0, 1], background included.

    `linear_*`: the principal components of blocks, fitted on these very volumes, with as many coefficients per
    block as the autoencoder has channels: no linear block code does better on them.
    """

    name: str
    n: int
    size: tuple[int, int, int]
    psnr_db: float
    ssim: float
    linear_psnr_db: float
    linear_ssim: float

    @property
    def gain_db(self) -> float:
        """PSNR above the linear code."""
        return self.psnr_db - self.linear_psnr_db

    def to_dict(self) -> dict[str, Any]:
        """Plain rounded values, for JSON."""
        values = {**asdict(self), "gain_db": self.gain_db}
        return {key: round(value, 4) if isinstance(value, float) else value for key, value in values.items()}


def linear_code(volumes: Tensor, coefficients: int, factor: int = 4) -> Tensor:
    """Reconstruct (N, 1, I, J, K) from the first principal components of its blocks of `factor`^3 voxels.

    The components are those of all blocks of `volumes`: the linear code of least squared error for this set.
    """
    n, _, *size = volumes.shape
    i, j, k = (m // factor for m in size)
    f = factor
    blocks = volumes.reshape(n, i, f, j, f, k, f).permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, f**3).double()
    mean = blocks.mean(0)
    centred = blocks - mean
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    basis = vectors[:, -coefficients:]
    coded = (centred @ basis @ basis.T + mean).to(volumes.dtype)
    return coded.reshape(n, i, j, k, f, f, f).permute(0, 1, 4, 2, 5, 3, 6).reshape(volumes.shape)


def measure(autoencoder: Autoencoder, sets: Mapping[str, Tensor]) -> list[QualityRow]:
    """One row per named set of volumes (N, 1, I, J, K), each set on its own grid."""
    rows = []
    for name, volumes in sets.items():
        decoded = torch.cat([autoencoder.reconstruct(v).cpu() for v in volumes.split(1)])
        linear = linear_code(volumes, autoencoder.latent_channels, autoencoder.factor)
        rows.append(
            QualityRow(
                name=name,
                n=len(volumes),
                size=(volumes.shape[2], volumes.shape[3], volumes.shape[4]),
                psnr_db=float(psnr(volumes, decoded).mean()),
                ssim=float(ssim(volumes, decoded).mean()),
                linear_psnr_db=float(psnr(volumes, linear).mean()),
                linear_ssim=float(ssim(volumes, linear).mean()),
            )
        )
    return rows


def latent_summary(autoencoder: Autoencoder, first: Tensor, second: Tensor) -> dict[str, list[float]]:
    """Per channel: mean and std of the latents of `first`, and of `second` whitened with them, and mean log sigma.

    A generator needs held-back latents that look like its training latents: means near 0, stds near 1.
    """
    a = autoencoder.encode(first)
    b = autoencoder.encode(second).mean
    axes = (0, 2, 3, 4)
    mean, std = a.mean.mean(axes), a.mean.std(axes)
    shape = (1, -1, 1, 1, 1)
    whitened = (b - mean.view(shape)) / std.view(shape)
    values = {
        "mean": mean,
        "std": std,
        "log_sigma": a.log_sigma.mean(axes),
        "held_back_whitened_mean": whitened.mean(axes),
        "held_back_whitened_std": whitened.std(axes),
    }
    return {key: [round(float(v), 4) for v in value] for key, value in values.items()}
