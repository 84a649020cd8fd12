"""How far samples lie from a torus whose points are known, and whether they cover it evenly."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

_POOLED_CELLS = 8


def pair_norms(x: Tensor) -> Tensor:
    """(rho_1, rho_2), the norms of the first and the last two coordinates: (N, 4, ...) -> (N, 2)."""
    return x.reshape(len(x), 2, 2).norm(dim=2)


def flat_distance(x: Tensor) -> Tensor:
    """sqrt((rho_1 - 1/sqrt 2)^2 + (rho_2 - 1/sqrt 2)^2), the distance in R^4 to the flat torus, (N,).

    Args:
        x: (N, 4, 1, 1, 1), unwhitened.
    """
    return (pair_norms(x) - math.sqrt(0.5)).norm(dim=1)


def norm_error(x: Tensor) -> Tensor:
    """|norm - 1|: what one would see who only knew that the torus lies on the unit sphere, (N,)."""
    return (x.flatten(1).norm(dim=1) - 1).abs()


def flat_angles(x: Tensor) -> Tensor:
    """(a, b) in (-pi, pi] of the nearest points of the flat torus, (N, 2)."""
    circles = x.reshape(len(x), 2, 2)
    return torch.atan2(circles[..., 1], circles[..., 0])


def ks_uniform(angles: Tensor) -> list[float]:
    """Kolmogorov-Smirnov p-values that each angle is uniform on the circle cut at -pi, one per column."""
    shares = (angles.double() / (2 * math.pi)) % 1
    return [float(stats.kstest(column.numpy(), "uniform").pvalue) for column in shares.T]


class TorusReader:
    """Where on the flat torus volumes lie, read by ridge regression on (cos a, sin a, cos b, sin b) / sqrt 2.

    The features are the values themselves, averaged over blocks so that no axis has more than 8; the reader is
    fitted to real volumes of known angles and never sees generated ones. A volume between two angles is read as a
    point off the torus, so that the distances and angles of points in R^4 serve for volumes too.

    Args:
        volumes: (N, C, I, J, K).
        points: (N, 4, 1, 1, 1), the flat torus at their angles.
        penalty: of the squared coefficients, for features of unit variance; keeps noise in generated volumes from
            being read as angles.
    """

    def __init__(self, volumes: Tensor, points: Tensor, penalty: float = 10.0) -> None:
        features, wanted = _pooled(volumes), points.flatten(1)
        self.mean, self.scale, self.intercept = features.mean(0), features.std(), wanted.mean(0)
        known = (features - self.mean) / self.scale
        gram = known.T @ known + penalty * torch.eye(known.shape[1])
        self.weights = torch.linalg.solve(gram, known.T @ (wanted - self.intercept))

    def __call__(self, volumes: Tensor) -> Tensor:
        """(N, C, I, J, K) -> (N, 4, 1, 1, 1)."""
        read = (_pooled(volumes) - self.mean) / self.scale @ self.weights + self.intercept
        return read.reshape(len(read), 4, 1, 1, 1)


def angle_errors(found: Tensor, true: Tensor) -> Tensor:
    """Absolute differences on the circle, in [0, pi], of angles of any shape."""
    return ((found - true + math.pi) % (2 * math.pi) - math.pi).abs()


def relative_residual(volumes: Tensor, points: Callable[[Tensor], Tensor], angles: Tensor, spread: float) -> Tensor:
    """Root mean square of volume - points(angles), in units of the manifold's own spread, (N,).

    0 is a point of the manifold; 1 is as far as real volumes are from their mean on average (root mean square).

    Args:
        volumes: (N, C, I, J, K), unwhitened.
        points: the manifold.
        angles: (N, 2), as read from the volumes.
        spread: root mean square of real volumes minus their mean volume.
    """
    return (volumes - points(angles)).flatten(1).square().mean(1).sqrt() / spread


def _pooled(volumes: Tensor) -> Tensor:
    block = [max(n // _POOLED_CELLS, 1) for n in volumes.shape[2:]]
    return F.avg_pool3d(volumes, block).flatten(1)
