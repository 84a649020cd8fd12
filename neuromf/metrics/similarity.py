"""Similarity of pairs of volumes: PSNR, SSIM, MS-SSIM, and the nearest reference of each volume.

All on the scale where data lie in [0, 1] (volumes are clipped to it first), so the data range is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from neuromf.errors import UserError
from neuromf.metrics.features import as_tensor, batches

WINDOW = 11
_SIGMA = 1.5
_C1, _C2 = 0.01**2, 0.03**2
_SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)

Volumes = Tensor | np.ndarray | Sequence[np.ndarray]


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, 10 log10(1 / MSE), of each pair: (B, 1, I, J, K) -> (B,) float64.

    Identical pairs give infinity.
    """
    error = (_unit(a) - _unit(b)).double().square().flatten(1).mean(1)
    return -10 * torch.log10(error)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) in three dimensions: (B, 1, I, J, K) -> (B,) float64.

    Gaussian window of 11 voxels (sigma 1.5), K = 0.01 and 0.03, mean over the positions where the window
    fits: MONAI's numbers (tested), three times faster, since the window is applied one axis at a time.
    torchmetrics also counts a reflected border, which moves the mean by up to 0.01.

    Raises:
        UserError: an axis is shorter than the window.
    """
    similarity, _ = _ssim_and_contrast(_unit(a), _unit(b))
    return similarity


def ms_ssim_scales(size: Sequence[int]) -> int:
    """How many of the five customary scales a volume of `size` voxels allows: the window must fit in each."""
    scales = 0
    while scales < len(_SCALE_WEIGHTS) and min(size) // 2**scales >= WINDOW:
        scales += 1
    return scales


def ms_ssim(a: Tensor, b: Tensor) -> Tensor:
    """Multi-scale SSIM (Wang et al. 2003): (B, 1, I, J, K) -> (B,) float64, in [0, 1].

    Five scales need 176 voxels per axis. Smaller volumes use the finest `ms_ssim_scales(size)` of them with
    their weights divided by the sum, so values compare only at equal numbers of scales: report it.
    Negative contrast terms count as 0.
    """
    a, b = _unit(a), _unit(b)
    scales = ms_ssim_scales(a.shape[2:])
    _check_window(a)
    weights = torch.tensor(_SCALE_WEIGHTS[:scales], dtype=torch.float64)
    weights = weights / weights.sum()
    product = torch.ones(len(a), dtype=torch.float64)
    for scale in range(scales):
        similarity, contrast = _ssim_and_contrast(a, b)
        term = similarity if scale == scales - 1 else contrast
        product = product * term.clamp(min=0) ** weights[scale]
        if scale < scales - 1:
            a, b = F.avg_pool3d(a, 2), F.avg_pool3d(b, 2)
    return product


def pairwise_diversity(volumes: Volumes, *, pairs: int = 100, seed: int = 0) -> Tensor:
    """MS-SSIM of random pairs of different volumes of one set, (pairs,); lower means more diverse.

    Compare with the same number of real-real pairs: a collapsed set scores above them.
    """
    n = len(volumes)
    generator = torch.Generator().manual_seed(seed)
    pairs = min(pairs, n * (n - 1) // 2)
    first = torch.randint(n, (pairs,), generator=generator)
    second = (first + torch.randint(1, max(n, 2), (pairs,), generator=generator)) % max(n, 1)
    values = [
        ms_ssim(*(as_tensor(volumes[int(i)])[None].float() for i in pair)) for pair in zip(first, second, strict=True)
    ]
    return torch.cat(values) if values else torch.empty(0, dtype=torch.float64)


Similarity = Callable[[Tensor, Tensor], Tensor]
"""(B, 1, I, J, K) twice -> (B,)."""


class Nearest(NamedTuple):
    """Of each volume (N,): the index of its nearest reference by voxel MSE, that MSE, SSIM, PSNR in dB; and LPIPS."""

    nearest: Tensor
    mse: Tensor
    ssim: Tensor
    psnr_db: Tensor
    lpips: Tensor | None = None


def nearest_similarity(
    volumes: Volumes,
    references: Volumes,
    *,
    lpips: Similarity | None = None,
    block_bytes: int = 1 << 28,
    progress: Callable[[int, int], None] | None = None,
) -> Nearest:
    """SSIM, PSNR and, if given, LPIPS of each volume to the reference nearest to it in mean squared voxel difference.

    References are streamed past blocks of volumes: memory does not grow with either set.

    Args:
        volumes: (N, 1, I, J, K) or a sequence of (1, I, J, K).
        references: the same of length M.
        lpips: of two volumes.
        block_bytes: of the volumes compared at once; of the references a quarter.
        progress: called with (volumes done, N).
    """
    found, errors, similarities, ratios, perceived = [], [], [], [], []
    voxels = as_tensor(volumes[0]).numel()
    block = max(block_bytes // (4 * voxels), 1)
    for queries in batches(volumes, block):
        queries = _unit(queries)
        indices = _nearest(queries.flatten(1), references, max(block // 4, 1))
        found.append(indices)
        for query, j in zip(queries.split(1), indices.tolist(), strict=True):
            reference = _unit(as_tensor(references[j])[None])
            errors.append((query - reference).double().square().mean()[None])
            similarities.append(ssim(query, reference))
            ratios.append(psnr(query, reference))
            if lpips is not None:
                perceived.append(lpips(query, reference))
            if progress is not None:
                progress(len(errors), len(volumes))
    mse, structure, ratio = (torch.cat(parts) for parts in (errors, similarities, ratios))
    return Nearest(torch.cat(found), mse, structure, ratio, torch.cat(perceived) if lpips is not None else None)


def _nearest(queries: Tensor, references: Volumes, batch_size: int) -> Tensor:
    """Index of the nearest reference of each query (B, D), by |a|^2 - 2 a.b (the query's own norm is common)."""
    best = torch.full((len(queries),), torch.inf)
    index = torch.zeros(len(queries), dtype=torch.long)
    start = 0
    for batch in batches(references, batch_size):
        flat = _unit(batch).flatten(1)
        score, position = (flat.square().sum(1) - 2 * queries @ flat.T).min(1)
        index = torch.where(score < best, start + position, index)
        best = torch.minimum(score, best)
        start += len(batch)
    return index


def _ssim_and_contrast(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Mean SSIM and mean contrast-structure term of each pair, (B,) float64 each."""
    _check_window(a)
    mean_a, mean_b, square_a, square_b, product = _blur(torch.cat([a, b, a * a, b * b, a * b])).chunk(5)
    variance_a = (square_a - mean_a**2).clamp(min=0)
    variance_b = (square_b - mean_b**2).clamp(min=0)
    covariance = product - mean_a * mean_b
    contrast = (2 * covariance + _C2) / (variance_a + variance_b + _C2)
    luminance = (2 * mean_a * mean_b + _C1) / (mean_a**2 + mean_b**2 + _C1)
    return tuple(x.double().flatten(1).mean(1).cpu() for x in (luminance * contrast, contrast))  # type: ignore[return-value]


def _blur(x: Tensor) -> Tensor:
    """Gaussian window over the valid positions, one axis after the other."""
    offsets = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    kernel = torch.exp(-0.5 * (offsets / _SIGMA) ** 2)
    kernel = kernel / kernel.sum()
    for axis in (2, 3, 4):
        shape = [1, 1, 1, 1, 1]
        shape[axis] = WINDOW
        x = F.conv3d(x, kernel.view(shape))
    return x


def _unit(x: Tensor) -> Tensor:
    return x.float().clamp(0, 1)


def _check_window(x: Tensor) -> None:
    if min(x.shape[2:]) < WINDOW:
        raise UserError(
            f"SSIM needs at least {WINDOW} voxels per axis, got {tuple(x.shape[2:])}",
            "use larger volumes; PSNR has no such limit",
        )
