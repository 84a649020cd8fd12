from __future__ import annotations

import numpy as np
import pytest
import torch

from neuromf.errors import UserError
from neuromf.metrics.similarity import (
    ms_ssim,
    ms_ssim_scales,
    nearest_similarity,
    pairwise_diversity,
    psnr,
    ssim,
)
from neuromf.vision_shim import prepare_torchvision


def _volumes(n: int, side: int = 24, seed: int = 0) -> torch.Tensor:
    """Smooth random volumes in [0, 1]."""
    noise = torch.rand(n, 1, side // 4, side // 4, side // 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(noise, size=side, mode="trilinear")


def test_ssim_agrees_with_monai_and_torchmetrics() -> None:
    prepare_torchvision()
    from monai.metrics.regression import compute_ssim_and_cs
    from torchmetrics.functional.image import structural_similarity_index_measure

    a = _volumes(2)
    b = (a + 0.1 * torch.randn(a.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    monai, _ = compute_ssim_and_cs(
        a, b, 3, data_range=torch.tensor(1.0), kernel_type="gaussian", kernel_size=[11] * 3, kernel_sigma=[1.5] * 3
    )
    torch.testing.assert_close(ssim(a, b).float(), monai.flatten(1).mean(1), atol=1e-5, rtol=1e-4)
    _, image = structural_similarity_index_measure(a, b, data_range=1.0, reduction="none", return_full_image=True)
    inside = image[:, :, 5:-5, 5:-5, 5:-5]  # torchmetrics also counts a reflected border
    torch.testing.assert_close(ssim(a, b).float(), inside.flatten(1).mean(1), atol=1e-5, rtol=1e-4)


def test_ms_ssim_agrees_with_monai_on_two_scales() -> None:
    from monai.metrics.regression import compute_ms_ssim

    a, b = _volumes(2), _volumes(2, seed=5) * 0.5 + 0.5 * _volumes(2)
    assert ms_ssim_scales(a.shape[2:]) == 2
    weights = (0.0448 / 0.3304, 0.2856 / 0.3304)
    monai = compute_ms_ssim(a, b, 3, data_range=torch.tensor(1.0), kernel_size=11, weights=weights)
    torch.testing.assert_close(ms_ssim(a, b).float(), monai.flatten(), atol=1e-5, rtol=1e-4)


def test_a_volume_is_like_itself() -> None:
    a = _volumes(2)
    torch.testing.assert_close(ssim(a, a), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(ms_ssim(a, a), torch.ones(2, dtype=torch.float64))
    assert psnr(a, a).tolist() == [float("inf")] * 2


def test_psnr_agrees_with_torchmetrics() -> None:
    prepare_torchvision()
    from torchmetrics.functional.image import peak_signal_noise_ratio

    a, b = _volumes(2), _volumes(2, seed=5)
    expected = peak_signal_noise_ratio(a, b, data_range=1.0, reduction="none", dim=(1, 2, 3, 4))
    torch.testing.assert_close(psnr(a, b).float(), expected, rtol=1e-5, atol=1e-5)


def test_psnr_is_in_decibel_of_the_clipped_range() -> None:
    a = torch.full((1, 1, 4, 4, 4), 0.5)
    assert float(psnr(a, a + 0.1)) == pytest.approx(20, abs=1e-5)
    assert float(psnr(a + 1.0, a + 2.0)) == float("inf")  # both are 1 after clipping


@pytest.mark.parametrize(("size", "scales"), [((10, 64, 64), 0), ((11, 64, 64), 1), ((64,) * 3, 3), ((176,) * 3, 5)])
def test_the_number_of_scales_follows_the_shortest_axis(size, scales) -> None:
    assert ms_ssim_scales(size) == scales


def test_the_nearest_reference_is_found_across_blocks_and_batches() -> None:
    references = _volumes(40)
    order = torch.tensor([33, 0, 17, 5, 39])
    queries = references[order] + 0.01
    found = nearest_similarity(queries.numpy(), references.numpy(), block_bytes=2 * 4 * queries[0].numel())
    assert found.nearest.tolist() == order.tolist()
    expected = (queries.clamp(0, 1) - references[order]).double().square().flatten(1).mean(1)
    torch.testing.assert_close(found.mse, expected, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(found.ssim, ssim(queries, references[order]))
    torch.testing.assert_close(found.psnr_db, psnr(queries, references[order]))


def test_a_further_similarity_is_of_each_volume_and_its_nearest() -> None:
    references = _volumes(6)
    queries = references[[4, 1]] + 0.01
    found = nearest_similarity(queries, references, lpips=lambda a, b: (a - b).abs().flatten(1).mean(1).double())
    expected = (queries.clamp(0, 1) - references[[4, 1]]).abs().flatten(1).mean(1).double()
    torch.testing.assert_close(found.lpips, expected, rtol=1e-5, atol=1e-8)
    assert nearest_similarity(queries, references).lpips is None


def test_a_collapsed_set_is_less_diverse() -> None:
    varied = _volumes(4)
    collapsed = varied[:1] + 0.02 * (varied - varied[:1])
    assert pairwise_diversity(collapsed, pairs=4).mean() > pairwise_diversity(varied, pairs=4).mean() + 0.2
    assert len(pairwise_diversity(varied, pairs=1000)) == 6  # no more than there are
    assert len(pairwise_diversity(varied[:1])) == 0
    torch.testing.assert_close(
        pairwise_diversity(varied, pairs=4, seed=1), pairwise_diversity(np.asarray(varied), pairs=4, seed=1)
    )


def test_volumes_smaller_than_the_window_are_refused() -> None:
    small = torch.rand(1, 1, 16, 10, 16)
    for function in (ssim, ms_ssim):
        with pytest.raises(UserError, match="11 voxels"):
            function(small, small)
