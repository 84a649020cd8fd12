"""Solid shapes as depth fields: positive inside, zero on the surface, about in mm; the clay of the phantom.

Points are head coordinates (3, ...) in mm, RAS+; a depth field has the shape of one coordinate.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F

from neuromf.data.fields import normal

Point = tuple[float, float, float]
_CUBE_MM, _CUBE = 240.0, 64  # the periodic cube that holds folding noise


def ellipsoid(points: torch.Tensor, centre: Point, radii: Point) -> torch.Tensor:
    """Depth inside an ellipsoid, exact to first order near the surface: k0 (1 - k0) / k1."""
    x, y, z = (points[axis] - centre[axis] for axis in range(3))
    a, b, c = (1 / radius**2 for radius in radii)
    k0 = (x * x * a + y * y * b + z * z * c).sqrt_()
    k1 = (x * x * a**2 + y * y * b**2 + z * z * c**2).sqrt_().clamp_(min=1e-6)
    return k0 * (1 - k0) / k1


def chain(points: torch.Tensor, nodes: Sequence[tuple[Point, float]]) -> torch.Tensor:
    """Depth inside a chain of round cones through `nodes` (centre, radius).

    With t the share of the nearest point on the segment s + t a: |p - s - t a|^2 = |p - s|^2 - t (2 (p - s).a - t a.a).
    """
    centres = torch.tensor([centre for centre, _ in nodes], dtype=torch.float32)
    along = centres[1:] - centres[:-1]
    from_start = torch.einsum("na,a...->n...", centres, points)
    squared = points.square().sum(dim=0)
    depth = torch.full_like(squared, -1e3)
    for n, ((_, r0), (_, r1)) in enumerate(pairwise(nodes)):
        length2 = float(along[n] @ along[n])
        dot = (from_start[n + 1] - from_start[n]).sub_(float(along[n] @ centres[n]))
        share = (dot / length2).clamp_(0, 1)
        rest = squared.sub(from_start[n], alpha=2).add_(float(centres[n] @ centres[n]))
        rest.sub_(dot.mul_(2).sub_(share, alpha=length2).mul_(share))
        depth = torch.maximum(depth, share.mul_(r1 - r0).add_(r0).sub_(rest.clamp_(min=0).sqrt_()))
    return depth


def union(*depths: torch.Tensor, softness_mm: float = 3.0) -> torch.Tensor:
    """Smooth union: the log-sum-exp of the depths, which rounds the seams over `softness_mm`."""
    return torch.logsumexp(torch.stack(depths) / softness_mm, dim=0) * softness_mm


def sheet(signed_mm: torch.Tensor, *beyond_mm: torch.Tensor) -> torch.Tensor:
    """Distance to a piece of the surface `signed_mm` = 0 that ends where any of `beyond_mm` turns positive."""
    squared = signed_mm * signed_mm
    for beyond in beyond_mm:
        squared += beyond.clamp(min=0) ** 2
    return squared.sqrt_()


def folding_noise(rng: np.random.Generator, period_mm: float, bandwidth: float = 0.25) -> torch.Tensor:
    """Random field of unit variance on a periodic 240 mm cube, all of whose waves are about `period_mm` long.

    Its zero crossings are winding sheets about half a period apart, as sulci are.
    """
    frequency = torch.fft.fftfreq(_CUBE, _CUBE_MM / _CUBE)
    last = torch.fft.rfftfreq(_CUBE, _CUBE_MM / _CUBE)
    radius = (frequency[:, None, None] ** 2 + frequency[:, None] ** 2 + last**2).sqrt()
    ring = torch.exp(-0.5 * ((radius * period_mm - 1) / bandwidth) ** 2)
    waves = torch.fft.rfftn(normal(rng, _CUBE, _CUBE, _CUBE)) * ring
    noise = torch.fft.irfftn(waves, s=(_CUBE, _CUBE, _CUBE))
    return noise / noise.std()


def look_up(noise: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Value of a `folding_noise` cube at head coordinates (3, i, j, k)."""
    grid = (points * (2 / _CUBE_MM)).flip(0).movedim(0, -1)[None]
    return F.grid_sample(noise[None, None], grid, padding_mode="reflection", align_corners=False)[0, 0]


def signed_distance(field: torch.Tensor, step_mm: float) -> torch.Tensor:
    """Distance in mm to the zero crossing of `field`, with its sign, to first order: f / |grad f|."""
    gradients = torch.gradient(field, spacing=step_mm)
    steepness = torch.stack(gradients).square().sum(dim=0).sqrt()
    return field / (steepness + 0.25 * steepness.mean())
