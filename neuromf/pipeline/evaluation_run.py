"""What the measurements of one evaluation work with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from neuromf.data.volume_sets import VolumeSet
from neuromf.pipeline.evaluation_report import Results

Progress = Callable[[str, int, int], None]


class Autoencoder(Protocol):
    """What is needed of an autoencoder."""

    name: str
    sha256: str

    def encode(self, volume: Tensor, /) -> Any:
        """(B, 1, I, J, K) -> a posterior with `.mean` (B, C, i, j, k)."""
        ...

    def check_size(self, size: Any, /) -> Any:
        """Raise UserError for a size it cannot take."""
        ...


class Run(NamedTuple):
    """Records go to `results`; features are kept in `cache`."""

    sets: dict[str, VolumeSet]
    results: Results
    autoencoder: Autoencoder
    features: tuple[str, ...]
    cache: Path
    batch_size: int
    seed: int
    device: str | torch.device
    tell: Progress

    def counts(self, *names: str) -> dict[str, int]:
        """N of each set; of the generated and the real one by default."""
        return {name: len(self.sets[name]) for name in names or ("generated", "real")}
