"""Fidelity and variety apart: precision and recall, density and coverage, by nearest neighbours in feature space."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from neuromf.errors import UserError

PRECISION_NEIGHBOURS = 3
DENSITY_NEIGHBOURS = 5


class Membership(NamedTuple):
    """One value per volume, whose means are the metrics: of generated ones (N,), or of real ones (M,).

    Attributes:
        precision: (N,) whether it lies within the real set.
        recall: (M,) whether it lies within the generated set.
        density: (N,) how many real neighbourhoods it lies in, over k; 1 on average for equal distributions.
        coverage: (M,) whether its neighbourhood holds a generated volume.
    """

    precision: Tensor
    recall: Tensor
    density: Tensor
    coverage: Tensor


def membership(
    generated: Tensor,
    real: Tensor,
    *,
    precision_k: int = PRECISION_NEIGHBOURS,
    density_k: int = DENSITY_NEIGHBOURS,
) -> Membership:
    """Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020), float64 each.

    A set is the union of balls around its volumes, each reaching to the volume's k-th nearest neighbour in the set.

    Args:
        generated: (N, D).
        real: (M, D).
        precision_k: k of precision and recall.
        density_k: k of density and coverage.

    Raises:
        UserError: a set without k neighbours, of another width, or not finite.
    """
    k = max(precision_k, density_k)
    if generated.ndim != 2 or real.ndim != 2 or generated.shape[1] != real.shape[1]:
        raise UserError(f"features of shapes {tuple(generated.shape)} and {tuple(real.shape)} cannot be compared")
    if min(len(generated), len(real)) <= k:
        raise UserError(
            f"{k} nearest neighbours need at least {k + 1} volumes on each side, got {len(generated)} and {len(real)}",
            "generate or provide more volumes",
        )
    generated, real = generated.double(), real.double()
    if not (generated.isfinite().all() and real.isfinite().all()):
        raise UserError("the features hold NaN or Inf", "find the volume that is not finite and leave it out")
    distance = torch.cdist(generated, real)
    radii = {n: (_radii(generated, n), _radii(real, n)) for n in {precision_k, density_k}}
    in_real = distance <= radii[precision_k][1]
    in_generated = distance <= radii[precision_k][0][:, None]
    in_wider_real = (distance <= radii[density_k][1]).double()
    return Membership(
        in_real.any(1).double(), in_generated.any(0).double(), in_wider_real.sum(1) / density_k, in_wider_real.amax(0)
    )


def _radii(x: Tensor, k: int) -> Tensor:
    """Distance of each row to its k-th nearest other row, (N,)."""
    return torch.cat(
        [torch.cdist(rows, x).kthvalue(k + 1).values for rows in x.split(512)]
    )  # the nearest is the row itself
