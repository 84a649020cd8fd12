"""Smooth random fields on a grid: cubic B-splines through random knots, and the bending they define.

A field is evaluated by one small dense matrix per axis, which is fast on one core for any grid.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F

Size = tuple[int, int, int]
Window = tuple[slice, slice, slice]
_SQUARINGS = 5
_BENDING_GRID_MM = 6.0  # of the lattice on which the velocity is integrated; knots are 27 mm apart


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on the calling thread alone.

    These fields are small: more threads gain nothing, and on a busy machine waiting for them costs 10 to 20 times.
    It also makes the bits independent of the number of threads.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def normal(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    """Standard normal numbers, float32, from a numpy generator (its stream is stable over versions)."""
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))


def apply_matrices(field: torch.Tensor, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """Multiply each of the last three axes of `field` (..., i, j, k) by a matrix (I, i), (J, j), (K, k)."""
    a, b, c = matrices
    field = torch.matmul(field, c.T)
    field = torch.matmul(b, field)
    return torch.matmul(a, field.flatten(-2)).unflatten(-1, (b.shape[0], c.shape[0]))


def rotation(angles_deg: np.ndarray) -> np.ndarray:
    """Rotation matrix (3, 3): about x, then y, then z, in degrees."""
    matrix = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(angles_deg)):
        a, b = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    return matrix


def spline_weights(position: torch.Tensor, knots: int) -> torch.Tensor:
    """Cubic B-spline weights (n, knots) at `position` (n,), counted in knots from the second one.

    Rows have unit 2-norm instead of unit sum: independent normal knots then give unit variance everywhere.
    """
    distance = (position[:, None] - (torch.arange(knots) - 1.0)).abs()
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = (2 - distance).clamp(min=0) ** 3 / 6
    weights = torch.where(distance < 1, near, far)
    return weights / weights.norm(dim=1, keepdim=True)


def spline_matrix(count: int, length_mm: float, knot_mm: float) -> torch.Tensor:
    """Spline weights (count, knots) of `count` voxel centres along `length_mm`, knots at most `knot_mm` apart."""
    spans = max(1, math.ceil(length_mm / knot_mm))
    return spline_weights((torch.arange(count, dtype=torch.float32) + 0.5) * (spans / count), spans + 3)


def smooth_field(
    rng: np.random.Generator, size: Size, extent_mm: Sequence[float], knot_mm: float, channels: int = 1
) -> torch.Tensor:
    """Draw a smooth normal field (channels, I, J, K) of unit variance, its knots `knot_mm` apart."""
    matrices = [spline_matrix(n, length, knot_mm) for n, length in zip(size, extent_mm, strict=True)]
    knots = normal(rng, channels, *(m.shape[1] for m in matrices))
    return apply_matrices(knots, matrices)


def linear_matrix(count: int, coarse: int) -> torch.Tensor:
    """Linear interpolation (count, coarse) between two grids of voxel centres over the same length.

    Beyond the outermost coarse centres the line is continued, so that coordinates stay exact.
    """
    position = (torch.arange(count, dtype=torch.float32) + 0.5) * (coarse / count) - 0.5
    left = position.floor().clamp(0, coarse - 2)
    weights = torch.zeros(count, coarse)
    weights.scatter_(1, left.long()[:, None], (1 - (position - left))[:, None])
    return weights.scatter_(1, left.long()[:, None] + 1, (position - left)[:, None])


_ALL: Window = (slice(None), slice(None), slice(None))


def upsample(field: torch.Tensor, size: Size, window: Window = _ALL) -> torch.Tensor:
    """Linear interpolation of `field` (..., i, j, k) to (..., *size) over the same extent, cut to `window`."""
    coarse = field.shape[-3:]
    return apply_matrices(field, [linear_matrix(n, c)[w] for n, c, w in zip(size, coarse, window, strict=True)])


def gaussian_matrix(count: int, sigma: float) -> torch.Tensor:
    """Gaussian blur (count, count) with `sigma` in voxels; rows sum to one, so that edges keep their level."""
    index = torch.arange(count, dtype=torch.float32)
    weights = torch.exp(-0.5 * ((index[:, None] - index) / sigma) ** 2)
    return weights / weights.sum(dim=1, keepdim=True)


def blur(field: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur of the last three axes; `sigma` in voxels."""
    return apply_matrices(field, [gaussian_matrix(n, sigma) for n in field.shape[-3:]])


def bending(rng: np.random.Generator, extent_mm: Sequence[float], sd_mm: float, knot_mm: float = 27.0) -> torch.Tensor:
    """Draw an invertible displacement (3, i, j, k) in mm on a lattice of about 6 mm that spans `extent_mm`.

    The flow of a stationary velocity v with standard deviation `sd_mm`: u = v / 2^5, then five times
    u(x) <- u(x) + u(x + u(x)) (scaling and squaring, Arsigny et al. 2006).
    """
    i, j, k = (max(2, math.ceil(length / _BENDING_GRID_MM)) for length in extent_mm)
    u = smooth_field(rng, (i, j, k), extent_mm, knot_mm, channels=3) * (sd_mm / 2**_SQUARINGS)
    axes = [(torch.arange(n, dtype=torch.float32) + 0.5) * (2 / n) - 1 for n in (i, j, k)]
    identity = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    to_unit = 2 / torch.tensor(extent_mm, dtype=torch.float32).view(3, 1, 1, 1)
    for _ in range(_SQUARINGS):
        # grid_sample wants the coordinates last and in the order K, J, I.
        grid = (identity + u * to_unit).flip(0).movedim(0, -1)[None]
        u = u + F.grid_sample(u[None], grid, padding_mode="border", align_corners=False)[0]
    return u
