from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from neuromf.data.latents import LatentStatistics
from neuromf.data.preprocessing import Preprocessing
from neuromf.files import read_json
from neuromf.models.autoencoder import load_autoencoder
from neuromf.pipeline.encode import encode
from neuromf.pipeline.encode_effect import agreement, summarise


def statistics(channels: int) -> LatentStatistics:
    """Mean 0, standard deviation 2."""
    some = (0.0,) * channels
    return LatentStatistics(some, (2.0,) * channels, some, some, (), 0.0, (), (), 1, 1)


def volume(seed: int = 0) -> torch.Tensor:
    return torch.rand(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(seed))


def mirrored(x: torch.Tensor) -> torch.Tensor:
    return x.flip(2)


def test_flipping_commutes_with_the_identity_and_is_harmless():
    found = agreement(load_autoencoder("identity"), volume(), mirrored, statistics(1))
    assert (found.relative_error, found.relative_error_whitened, found.ssim) == (0, 0, 1)
    means = summarise([found])
    assert means["harmless"] is True
    assert means["psnr_db"] is None  # exact


def test_flipping_does_not_commute_with_the_haar_wavelet():
    # Mirroring a pair (a, b) turns its difference's sign: of E(x) = (sum, difference) the second half is 2 off.
    x = volume()
    autoencoder = load_autoencoder("haar")
    z = autoencoder.encode(x).mean
    odd = (z - autoencoder.encode(x.flip(2)).mean.flip(2)).abs().amax((0, 2, 3, 4)) > 1e-6
    assert odd.sum() == 4  # the bands that are high-pass along I
    found = agreement(autoencoder, x, mirrored, statistics(8))
    assert found.relative_error == pytest.approx(float(2 * z[:, odd].norm() / z.norm()), rel=1e-5)
    assert found.relative_error_whitened == pytest.approx(found.relative_error)
    assert found.psnr_db < 20
    assert found.psnr_db_encoded > 100
    assert found.ssim < 0.9
    assert summarise([found])["harmless"] is False


def test_gain_commutes_with_a_linear_autoencoder():
    found = agreement(load_autoencoder("haar"), volume(), lambda x: 0.95 * x, statistics(8))
    assert found.relative_error < 1e-6
    assert summarise([found])["harmless"] is True


def test_small_volumes_are_measured_without_ssim():
    found = agreement(load_autoencoder("haar"), torch.rand(1, 1, 8, 8, 8), mirrored, statistics(8))
    assert found.ssim is None
    assert summarise([found])["ssim"] is None


@pytest.fixture
def scans(tmp_path) -> Path:
    folder = tmp_path / "scans"
    folder.mkdir()
    for i in range(12):
        array = np.random.default_rng(i).gamma(2, 50, (16, 16, 16)).astype(np.float32)
        nib.save(nib.Nifti1Image(array, np.eye(4)), folder / f"s{i:02}.nii.gz")
    return folder


def test_encode_reports_the_effect_on_request_for_at_most_eight_scans(scans, tmp_path):
    options = {"autoencoder": load_autoencoder("haar"), "preprocessing": Preprocessing((16, 16, 16), None)}
    assert encode([scans], tmp_path / "out", **options).effect is None
    report = encode([scans], tmp_path / "out", **options, report=True)
    stored = read_json(tmp_path / "out" / "encode_report.json")["effect_on_latents"]
    assert stored == report.effect
    assert stored["n"] == 8
    assert (stored["flip"]["harmless"], stored["gain"]["harmless"]) == (False, True)
    lines = report.lines()
    assert any(line.startswith("flipping latents is NOT harmless here (N = 8): off by ") for line in lines)
    assert any(line.startswith("multiplying latents by 0.95 is harmless here (N = 8): off by 0.0%") for line in lines)
