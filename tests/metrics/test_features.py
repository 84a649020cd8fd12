from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from neuromf.metrics.features import descriptor, features


class _Identity:
    """An autoencoder whose latent is the volume and its negative."""

    def encode(self, volume):
        return SimpleNamespace(mean=torch.cat([volume, -volume], dim=1))


def test_the_descriptor_is_mean_and_deviation_of_each_cell() -> None:
    latent = torch.randn(3, 4, 6, 8, 4, generator=torch.Generator().manual_seed(0))
    out = descriptor(latent, grid=2)
    assert out.shape == (3, 2 * 4 * 8)
    assert out.dtype == torch.float64
    cell = latent[1, 2, 3:, :4, 2:].double()  # cell (1, 0, 1) of channel 2
    assert float(out[1, 2 * 8 + 5]) == pytest.approx(float(cell.mean()), rel=1e-6)
    assert float(out[1, 32 + 2 * 8 + 5]) == pytest.approx(float(cell.std(correction=0)), rel=1e-6)


def test_features_do_not_depend_on_the_batch_size_and_take_mirrored_views() -> None:
    volumes = np.random.default_rng(0).random((5, 1, 8, 8, 8), dtype=np.float32)
    one = features(volumes, _Identity(), batch_size=1)
    torch.testing.assert_close(features(volumes, _Identity(), batch_size=3), one)
    torch.testing.assert_close(features(torch.tensor(volumes), _Identity()), one)
    mirrored = features(volumes[:, :, ::-1], _Identity())
    assert not torch.allclose(mirrored, one)
    torch.testing.assert_close(mirrored[:, :4], one[:, 4:8])  # cells swap sides


def test_progress_counts_volumes() -> None:
    seen = []
    features(torch.rand(5, 1, 4, 4, 4), _Identity(), batch_size=2, progress=lambda *a: seen.append(a))
    assert seen == [(2, 5), (4, 5), (5, 5)]
