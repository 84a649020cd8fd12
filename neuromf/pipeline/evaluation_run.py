"""What the measurements of one evaluation work with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from neuromf.data.volume_sets import VolumeSet
from neuromf.metrics.features import Share as Part
from neuromf.pipeline.evaluation_report import Results
from neuromf.pipeline.sharing import Share, wait_for

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
    """Records go to `results`; features and segmentations are kept in `cache`, which processes share."""

    sets: dict[str, VolumeSet]
    results: Results
    autoencoder: Autoencoder
    features: tuple[str, ...]
    cache: Path
    batch_size: int
    seed: int
    device: str | torch.device
    tell: Progress
    share: Share

    def counts(self, *names: str) -> dict[str, int]:
        """N of each set; of the generated and the real one by default."""
        return {name: len(self.sets[name]) for name in names or ("generated", "real")}

    def part(self, what: str, batch_size: int | None = None) -> Part:
        """This process's part of files of which there is one for each volume; the main process waits for the others."""
        batch = batch_size or self.batch_size

        def wait(files: Sequence[Path], slowest_s: float) -> None:
            if self.share.main and self.share.processes > 1:
                wait_for(files, Path.is_file, what, slowest_s=slowest_s)

        return Part(lambda i: self.share.has(i // batch), wait)
