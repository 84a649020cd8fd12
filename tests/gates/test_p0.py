"""P0: the autoencoder. The built-in one stands in for MAISI's weights, which may not be redistributed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from neuromf.data.preprocessing import Preprocessing, preprocess
from neuromf.data.volumes import load_volume
from neuromf.metrics.similarity import psnr, ssim
from neuromf.models.autoencoder import Autoencoder, load_autoencoder

MARGIN_DB = 2.5


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    return load_autoencoder("builtin")


def volumes(paths: list[Path], size: tuple[int, int, int], spacing_mm: float) -> Tensor:
    spec = Preprocessing(size=size, spacing_mm=spacing_mm)
    return torch.stack([torch.from_numpy(preprocess(load_volume(path), spec).array) for path in paths])


def block_pca(x: Tensor, coefficients: int) -> Tensor:
    """The best linear code of 4^3 blocks with so many coefficients, fitted to these very volumes."""
    x = x.clamp(0, 1)
    n, _, i, j, k = x.shape
    blocks = x.view(n, i // 4, 4, j // 4, 4, k // 4, 4).permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, 64).double()
    centre = blocks.mean(0)
    directions = torch.linalg.eigh((blocks - centre).T @ (blocks - centre)).eigenvectors[:, -coefficients:]
    coded = (blocks - centre) @ directions @ directions.T + centre
    return coded.view(n, i // 4, j // 4, k // 4, 4, 4, 4).permute(0, 1, 4, 2, 5, 3, 6).reshape(x.shape).float()


def compare(name: str, x: Tensor, autoencoder: Autoencoder) -> tuple[float, float]:
    """(dB above the linear code of the same rate, SSIM), each the mean over the volumes."""
    ours, linear = autoencoder.reconstruct(x), block_pca(x, autoencoder.latent_channels)
    gain = float((psnr(x, ours) - psnr(x, linear)).mean())
    similarity = float(ssim(x, ours).mean())
    print(
        f"\n{name}, N = {len(x)}: {float(psnr(x, ours).mean()):.1f} dB, SSIM {similarity:.3f}; block PCA "
        f"{float(psnr(x, linear).mean()):.1f} dB, SSIM {float(ssim(x, linear).mean()):.3f}"
    )
    return gain, similarity


@pytest.mark.gate("P0-T4")
@pytest.mark.gate("P0-T5")
def test_heads_it_never_saw_come_back(autoencoder: Autoencoder, shared_data: Path) -> None:
    """One whole head and one stripped brain of two people, 2 mm."""
    paths = [shared_data / "wholebrain" / name for name in ("chris_t1.nii.gz", "MR_Gd.nii.gz")]
    gain, similarity = compare("heads at 2 mm", volumes(paths, (96, 112, 96), 2.0), autoencoder)
    assert gain >= MARGIN_DB
    assert similarity > 0.90


@pytest.mark.gate("P0-T5")
def test_hippocampus_crops_come_back_better_than_any_linear_code(autoencoder: Autoencoder, shared_data: Path) -> None:
    paths = sorted((shared_data / "hippocampus/images").glob("*.nii.gz"))[::11]
    gain, _ = compare("hippocampus crops at 1 mm", volumes(paths, (48, 64, 48), 1.0), autoencoder)
    assert gain >= MARGIN_DB


@pytest.mark.gate("P0-T6")
def test_autoencoder_is_frozen(autoencoder: Autoencoder) -> None:
    x = torch.rand(1, 1, 32, 32, 32, requires_grad=True)
    assert not autoencoder.reconstruct(x).requires_grad
    assert not autoencoder.encode(x).mean.requires_grad


@pytest.mark.gate("P0-T7")
def test_bfloat16_is_finite() -> None:
    half = load_autoencoder("builtin", dtype=torch.bfloat16)
    x = torch.rand(1, 1, 32, 32, 32)
    assert torch.isfinite(half.reconstruct(x)).all()
