"""Two-dimensional networks on volumes: which slices they see, in three planes."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from neuromf.models.extractors.extractor import Extractor

AXES = {"axial": 4, "coronal": 3, "sagittal": 2}
"""Axis of (B, 1, I, J, K), RAS+, along which each plane is stacked."""

SLICES = 16
_MIDDLE = 0.8
_AT_ONCE = 8


def slice_numbers(n: int, count: int | None) -> list[int]:
    """Which of `n` slices are seen: all, or `count` evenly spread over the middle 80 %.

    It depends on the grid alone, so that the same slices of both sets are compared.
    """
    if count is None or count >= n:
        return list(range(n))
    return [int(n * ((1 - _MIDDLE) / 2 + _MIDDLE * (s + 0.5) / count)) for s in range(count)]


class SliceExtractor(Extractor):
    """A network on slices of three planes.

    Args:
        network: (n, 3, H, W) -> (n, D).
        of_volume: applied to the volumes (B, 1, I, J, K) first.
        of_slices: (n, 1, H, W) -> the network's input (n, 3, H', W').
        count: slices per plane; None for all of them.
    """

    planes: ClassVar[tuple[str, ...]] = tuple(AXES)

    def __init__(
        self,
        name: str,
        sha256: str,
        preprocessing: str,
        *,
        network: Callable[[Tensor], Tensor],
        of_volume: Callable[[Tensor], Tensor],
        of_slices: Callable[[Tensor], Tensor],
        count: int | None = SLICES,
        device: torch.device | str = "cpu",
    ) -> None:
        seen = "all slices" if count is None else f"{count} slices evenly over the middle {_MIDDLE:.0%}"
        super().__init__(name, sha256, f"{preprocessing}; {seen} of each plane", device)
        self.network, self.of_volume, self.of_slices, self.count = network, of_volume, of_slices, count

    @torch.inference_mode()
    def __call__(self, volumes: Tensor) -> dict[str, Tensor]:
        """(B, 1, I, J, K) -> {plane: (B, S, D)}; slices pass the network a few at a time."""
        volumes = self.of_volume(volumes.to(self.device, torch.float32))
        features = {}
        for plane, axis in AXES.items():
            numbers = torch.tensor(slice_numbers(volumes.shape[axis], self.count), device=self.device)
            slices = volumes.index_select(axis, numbers).movedim(axis, 1).flatten(0, 1)
            rows = [self.network(self.of_slices(some)).float().cpu() for some in slices.split(_AT_ONCE)]
            features[plane] = torch.cat(rows).unflatten(0, (len(volumes), len(numbers)))
        return features
