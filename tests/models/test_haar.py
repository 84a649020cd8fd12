from __future__ import annotations

import pytest
import torch

from neuromf.models.haar import haar_forward, haar_inverse, haar_matrix


def volume(*size: int) -> torch.Tensor:
    return torch.randn(2, 1, *size, generator=torch.Generator().manual_seed(3))


def test_matrix_is_orthonormal() -> None:
    matrix = haar_matrix(torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(8, dtype=torch.float64))


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_inverse_undoes_forward_and_the_norm_is_kept(levels: int) -> None:
    x = volume(8, 16, 12)
    bands = haar_forward(x, levels)
    assert bands.shape == (2, 8**levels, 8 >> levels, 16 >> levels, 12 >> levels)
    torch.testing.assert_close(haar_inverse(bands, levels), x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(bands.norm(), x.norm(), rtol=1e-5, atol=0)


def test_first_channel_is_the_block_mean_times_the_root_of_its_voxels() -> None:
    x = volume(8, 8, 8)
    torch.testing.assert_close(haar_forward(x, 1)[:, :1], torch.nn.functional.avg_pool3d(x, 2) * 8**0.5)
    torch.testing.assert_close(haar_forward(x, 2)[:, :1], torch.nn.functional.avg_pool3d(x, 4) * 64**0.5)


def test_a_step_along_one_axis_fills_only_that_axis_own_band() -> None:
    x = torch.zeros(1, 1, 4, 4, 4)
    x[:, :, :, :, ::2] = 1.0  # changes along K only
    energy = haar_forward(x).square().sum((0, 2, 3, 4))
    assert energy.nonzero().flatten().tolist() == [0, 1]  # LLL and LLH


def test_odd_sizes_are_refused() -> None:
    with pytest.raises(AssertionError, match="even"):
        haar_forward(volume(8, 6, 8), 2)
