"""Memorisation audit: are generated volumes closer to training volumes than held-back real ones are?

For each generated volume, the distance to its nearest training neighbour, left-right mirrored copies
included; the same for held-back real volumes is the baseline. A model that copies puts many of its volumes
below the baseline's first percentile, where 1 % of fresh real ones would lie.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from neuromf.errors import UserError
from neuromf.metrics.features import Volumes, batches

PERCENTILE = 1.0
_LEFT_RIGHT = 2  # axis I of (B, 1, I, J, K), RAS+


class Neighbours(NamedTuple):
    """Of each query (N,): distance to the nearest reference, its index, and whether the query was mirrored."""

    distance: Tensor
    nearest: Tensor
    mirrored: Tensor


class Audit(NamedTuple):
    """`share` of the generated volumes below `threshold`, the baseline's first percentile."""

    share: float
    threshold: float
    n_generated: int
    n_baseline: int
    median_generated: float
    median_baseline: float
    closest: list[tuple[int, int, float]]  # (generated, training, distance), nearest first
    flagged: list[int]  # the generated volumes below the threshold


def pixel_codes(volumes: Volumes, *, side: int = 16, batch_size: int = 16) -> tuple[Tensor, Tensor]:
    """Average each volume down to `side`^3 at most and flatten, as it is and mirrored left to right.

    Distances between codes are insensitive to noise and to sub-voxel detail, and small enough that a whole
    training set stays in memory (16 kB a volume). Scaled by 1/sqrt(d), so that a squared distance is a mean
    squared error in intensity units.

    Args:
        volumes: (N, 1, I, J, K) or a sequence of (1, I, J, K), axis I left-right.

    Returns:
        Codes (N, d) and mirrored codes (N, d), float32.
    """
    plain: list[Tensor] = []
    mirrored: list[Tensor] = []
    for batch in batches(volumes, batch_size):
        i, j, k = (min(side, n) for n in batch.shape[2:])
        for codes, x in ((plain, batch), (mirrored, batch.flip(_LEFT_RIGHT))):
            code = F.adaptive_avg_pool3d(x, (i, j, k)).flatten(1)
            codes.append(code / code.shape[1] ** 0.5)
    return torch.cat(plain), torch.cat(mirrored)


def nearest_neighbours(queries: Tensor, mirrored: Tensor | None, references: Tensor) -> Neighbours:
    """Euclidean nearest reference (M, D) of each query (N, D), also trying the mirrored query if given."""
    distance, index = _nearest(queries, references)
    flipped = torch.zeros(len(queries), dtype=torch.bool)
    if mirrored is not None:
        other, other_index = _nearest(mirrored, references)
        flipped = other < distance
        distance, index = torch.where(flipped, other, distance), torch.where(flipped, other_index, index)
    return Neighbours(distance, index, flipped)


def audit(generated: Neighbours, baseline: Neighbours, *, pairs: int = 8) -> Audit:
    """Compare distances to training: generated volumes against held-back real ones.

    Args:
        generated: neighbours of the generated volumes among the training volumes.
        baseline: neighbours of the held-back real volumes among the same; with fewer than 100 of them the
            first percentile lies between the two smallest distances and is a rough threshold.
        pairs: how many of the closest pairs to name.

    Raises:
        UserError: a side is empty, or the baseline volumes are themselves in the training set.
    """
    if len(generated.distance) == 0 or len(baseline.distance) == 0:
        raise UserError("the memorisation audit needs generated and held-back volumes", "give both sets")
    threshold = float(torch.quantile(baseline.distance.double(), PERCENTILE / 100))
    if threshold <= 1e-6 * float(baseline.distance.max().clamp(min=1e-30)):
        raise UserError(
            "held-back volumes are also in the training folder (distance 0), so there is no baseline",
            "give --real a folder of volumes that training never saw",
        )
    below = generated.distance < threshold
    order = generated.distance.argsort()[:pairs].tolist()
    closest = [(i, int(generated.nearest[i]), float(generated.distance[i])) for i in order]
    return Audit(
        share=float(below.double().mean()),
        threshold=threshold,
        n_generated=len(generated.distance),
        n_baseline=len(baseline.distance),
        median_generated=float(generated.distance.median()),
        median_baseline=float(baseline.distance.median()),
        closest=closest,
        flagged=below.nonzero().flatten().tolist(),
    )


def _nearest(queries: Tensor, references: Tensor, block: int = 256) -> tuple[Tensor, Tensor]:
    """Smallest distance and its index, (N,) each; direct differences keep near copies exact."""
    parts = [
        torch.cdist(rows.double(), references.double(), compute_mode="donot_use_mm_for_euclid_dist").min(1)
        for rows in queries.split(block)
    ]
    return torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])
