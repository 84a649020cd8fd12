"""Data whose answer is known: a torus in R^4, and volumes that two angles on a torus make.

Both map uniform angles (a, b) to tensors of the rank that training knows, so that a run on them differs from one on
brains by its data alone. Everything is a function of its angles, and the angles of a seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from neuromf.data.latents import LatentStatistics
from neuromf.data.moments import ChannelMoments

MAJOR_RADIUS, MINOR_RADIUS = 3.0, 1.0
FIELD_OF_VIEW = 8.0
"""Edge of the blobs' box, in the unit of the radii."""
_WIDTH, _WIDTH_CHANGE = 1.5, 0.3
_AMPLITUDE_CHANGE = 0.3
# What each channel takes for (a, b), as whole combinations of the two angles with determinant 1 or -1: every channel
# alone tells both angles, each in another way.
_CHANNEL_ANGLES = ((1, 0, 0, 1), (0, 1, 1, 0), (1, 1, 0, 1), (1, -1, 1, 0))
_CHUNK = 512
_RAM_LIMIT_BYTES = 1 << 30


class Manifold(Protocol):
    """A torus of dimension two in the space of tensors of one shape."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, I, J, K) of a point."""

    def points(self, angles: Tensor) -> Tensor:
        """(N, 2) angles in radians -> (N, C, I, J, K), float32."""


def uniform_angles(count: int, generator: torch.Generator) -> Tensor:
    """Angles (a, b) uniform on [0, 2 pi)^2, (N, 2)."""
    return 2 * math.pi * torch.rand(count, 2, generator=generator)


@dataclass(frozen=True)
class FlatTorus:
    """(cos a, sin a, cos b, sin b) / sqrt 2: a torus without curvature on the unit sphere of R^4.

    Example:
        >>> FlatTorus().points(torch.zeros(1, 2)).flatten().tolist()
        [0.7071067690849304, 0.0, 0.7071067690849304, 0.0]
    """

    shape: tuple[int, ...] = (4, 1, 1, 1)

    def points(self, angles: Tensor) -> Tensor:
        """(N, 2) -> (N, 4, 1, 1, 1)."""
        a, b = angles.unbind(-1)
        values = torch.stack([a.cos(), a.sin(), b.cos(), b.sin()], dim=-1) / math.sqrt(2)
        return values.reshape(len(angles), *self.shape)


@dataclass(frozen=True)
class BlobTorus:
    """Volumes of four channels, each a Gaussian blob whose centre, width and amplitude follow two angles.

    In a channel with the angles (p, q) the blob lies at (R + r cos p, r sin p, r sin q) with R = 3 and r = 1, its
    width is 1.5 + 0.3 cos q, its amplitude 1 + 0.3 cos p. The box runs from 0 to 8 along the first axis and from -4
    to 4 along the others, whatever the number of cells.

    Args:
        size: cells per axis.
    """

    size: int = 8

    @property
    def shape(self) -> tuple[int, ...]:
        """(4, size, size, size)."""
        return (len(_CHANNEL_ANGLES), self.size, self.size, self.size)

    def points(self, angles: Tensor) -> Tensor:
        """(N, 2) -> (N, 4, S, S, S)."""
        return torch.cat([self._render(part) for part in angles.split(_CHUNK)])

    def _render(self, angles: Tensor) -> Tensor:
        mixing = torch.tensor(_CHANNEL_ANGLES, dtype=angles.dtype).reshape(-1, 2, 2)
        p, q = torch.einsum("kij,nj->ink", mixing, angles)  # (N, C) each
        cells = (torch.arange(self.size, dtype=angles.dtype) + 0.5) * (FIELD_OF_VIEW / self.size)
        middle = FIELD_OF_VIEW / 2
        centre = torch.stack(
            [
                MAJOR_RADIUS + MINOR_RADIUS * p.cos(),
                middle + MINOR_RADIUS * p.sin(),
                middle + MINOR_RADIUS * q.sin(),
            ]
        )
        width = _WIDTH + _WIDTH_CHANGE * q.cos()
        profiles = torch.exp(-0.5 * ((cells - centre[..., None]) / width[..., None]) ** 2)  # (3, N, C, S)
        i, j, k = profiles
        return (1 + _AMPLITUDE_CHANGE * p.cos())[..., None, None, None] * torch.einsum("nci,ncj,nck->ncijk", i, j, k)


class TorusDataset(Dataset[Tensor]):
    """Whitened points of a manifold at given angles; made once if they take less than 1 GiB, else when asked for.

    Args:
        manifold: where the points lie.
        angles: (N, 2).
        statistics: of the training points.
    """

    def __init__(
        self,
        manifold: Manifold,
        angles: Tensor,
        statistics: LatentStatistics,
        *,
        ram_limit_bytes: int = _RAM_LIMIT_BYTES,
    ) -> None:
        self.manifold, self.angles, self.statistics = manifold, angles, statistics
        n_bytes = 4 * len(angles) * math.prod(manifold.shape)
        self._whitened = self._points(angles) if n_bytes < ram_limit_bytes else None

    def __len__(self) -> int:
        return len(self.angles)

    def __getitem__(self, index: int) -> Tensor:
        """(C, I, J, K) float32, whitened."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Tensor]:
        """A batch at once: a thousand single look-ups would cost as much as the network's step."""
        at = torch.as_tensor(indices)
        return list(self._points(self.angles[at]) if self._whitened is None else self._whitened[at])

    def _points(self, angles: Tensor) -> Tensor:
        return self.statistics.whiten(self.manifold.points(angles))


class TorusSplit(NamedTuple):
    """What one seed makes of a manifold: whitened training and held-back points, and the statistics of the former."""

    train: TorusDataset
    held_back: TorusDataset
    statistics: LatentStatistics


def torus_split(manifold: Manifold, train: int, held_back: int, seed: int) -> TorusSplit:
    """Points at uniform angles drawn from a seed; both parts are whitened with the training part's statistics."""
    angles = uniform_angles(train + held_back, torch.Generator().manual_seed(seed))
    statistics = point_statistics(manifold, angles[:train])
    known, unseen = (TorusDataset(manifold, part, statistics) for part in angles.split([train, held_back]))
    return TorusSplit(known, unseen, statistics)


def point_statistics(manifold: Manifold, angles: Tensor) -> LatentStatistics:
    """Per-channel statistics of the points at these angles (N, 2), as `encode` makes them of latents.

    The points are exact: there is no posterior noise. Principal components are left out.
    """
    moments = ChannelMoments(manifold.shape[0])
    for part in angles.split(_CHUNK):
        values = manifold.points(part).transpose(0, 1)
        moments.update(values, torch.full_like(values, -torch.inf))
    return LatentStatistics(
        mean=_tuple(moments.mean),
        std=_tuple(moments.std),
        skewness=_tuple(moments.skewness),
        kurtosis=_tuple(moments.kurtosis),
        correlation=tuple(_tuple(row) for row in moments.correlation),
        sigma2_share=0.0,
        sigma2_share_per_channel=(0.0,) * len(moments.mean),
        pca_explained_variance=(),
        files=len(angles),
        voxels=moments.count,
    )


def _tuple(values: Tensor) -> tuple[float, ...]:
    return tuple(float(v) for v in values)
