"""Features of volumes: those of the autoencoder the latents were made with, and a store for those of any extractor.

The autoencoder's are called by their own name, "builtin": no distance of them is ever an "FID". They are always
available offline; extractors with foreign weights are handed in as objects of the same shape (`Extractor`).
"""

from __future__ import annotations

import hashlib
import json
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from neuromf.files import atomic_path, sha256_text

GRID = 2
STORE_FORMAT = 1  # a higher number makes all stored features be computed anew
_AT_ONCE = 64  # volumes whose slices are in memory

Volumes = Tensor | np.ndarray | Sequence[np.ndarray]


class Extractor(Protocol):
    """Volumes (B, 1, I, J, K) -> {plane: (B, S, D)}; `sha256` and `preprocessing` go into every report."""

    name: str
    sha256: str
    preprocessing: str

    @property
    def planes(self) -> tuple[str, ...]:
        """The keys of what it returns."""
        ...

    def __call__(self, volumes: Tensor, /) -> dict[str, Tensor]:
        """Features of S slices of each volume, or of the whole of it (S = 1)."""
        ...


class _Encoder(Protocol):
    """What is needed of an autoencoder: `encode(volume).mean`."""

    sha256: str

    def encode(self, volume: Tensor, /) -> Any: ...


class EncoderFeatures:
    """Descriptor of each volume: mean and spread of every latent channel in each cell of a coarse grid.

    The posterior mean (B, C, i, j, k) is pooled on `grid`^3 cells. Cell means say where tissue is, cell
    standard deviations how much detail there is, so blur, noise, lost anatomy and a collapsed set all move
    it. D = 2 C grid^3: 128 for the 8 channels of the built-in autoencoder, 64 for MAISI's 4. That is on purpose
    small: a covariance of D dimensions needs N > D volumes, and sets of 64 to 256 must do on a laptop. Measured
    on 64 hippocampus crops a side (4 linear channels), a blur of 1 voxel is 7.7 times the real-real Frechet
    distance at grid 2, 3.8 times at grid 3 (D = 216), and halving the variety 8.7 against 4.3 times.

    Args:
        encoder: an `Autoencoder`.
        grid: cells per axis.
    """

    name = "builtin"
    planes = ("volume",)

    def __init__(self, encoder: _Encoder, *, grid: int = GRID, device: str | torch.device = "cpu") -> None:
        self.encoder, self.grid, self.device = encoder, grid, device
        self.sha256 = encoder.sha256
        self.preprocessing = f"as stored; latent mean and deviation in {grid}^3 cells"

    def __call__(self, volumes: Tensor) -> dict[str, Tensor]:
        """(B, 1, I, J, K) -> {"volume": (B, 1, 2 C grid^3)}, float64."""
        with torch.no_grad():
            return {"volume": descriptor(self.encoder.encode(volumes.to(self.device)).mean, self.grid)[:, None]}


def descriptor(latent: Tensor, grid: int = GRID) -> Tensor:
    """Pool latents (B, C, i, j, k) to (B, 2 C grid^3) float64 on the CPU: cell means, cell deviations."""
    latent = latent.detach().double().cpu()
    mean = F.adaptive_avg_pool3d(latent, grid)
    variance = F.adaptive_avg_pool3d(latent.square(), grid) - mean.square()
    return torch.cat([mean.flatten(1), variance.clamp(min=0).sqrt().flatten(1)], dim=1)


class FeatureSet:
    """Features of N volumes in files, one of each: read a plane at a time, since all would not fit in memory."""

    def __init__(self, files: Sequence[Path], planes: Sequence[str]) -> None:
        self.files, self.planes = list(files), tuple(planes)

    def __len__(self) -> int:
        return len(self.files)

    def shape(self, plane: str) -> tuple[int, int, int]:
        """(N, S, D) of one plane; nothing but the first volume's is read."""
        slices, dimension = _plane(self.files[0], plane).shape
        return len(self), slices, dimension

    def plane(self, name: str, slices: Sequence[int] | None = None) -> Tensor:
        """(N, S, D) of one plane; of some slices only, if they are named."""
        first = _plane(self.files[0], name)[slices if slices is not None else slice(None)]
        rows = np.empty((len(self), *first.shape), dtype=first.dtype)
        for i, file in enumerate(self.files):
            rows[i] = _plane(file, name)[slices if slices is not None else slice(None)]
        return torch.from_numpy(rows)

    def parts(self, name: str, volumes: Sequence[int]) -> Iterator[Tensor]:
        """The slices (n, D) of some volumes, a few volumes at a time."""
        for start in range(0, len(volumes), _AT_ONCE):
            rows = [_plane(self.files[i], name) for i in volumes[start : start + _AT_ONCE]]
            yield torch.from_numpy(np.concatenate(rows))

    def vectors(self) -> Tensor:
        """One vector per volume, (N, D times the number of planes): the mean over the slices of each plane."""
        rows = [np.concatenate([_plane(file, name).mean(0) for name in self.planes]) for file in self.files]
        return torch.from_numpy(np.stack(rows))


class Share(NamedTuple):
    """The part of one process where several fill a folder together.

    Attributes:
        mine: whether it is to do volume i.
        wait: until all files are there, given the seconds that the slowest of its own took; or for nothing where
            another process goes on with them.
    """

    mine: Callable[[int], bool]
    wait: Callable[[Sequence[Path], float], None]


ALL = Share(lambda _: True, lambda *_: None)


def extract(
    volumes: Volumes,
    extractor: Extractor,
    folder: Path,
    *,
    keys: Sequence[str] | None = None,
    batch_size: int = 4,
    share: Share = ALL,
    progress: Callable[[int, int], None] | None = None,
) -> FeatureSet:
    """Features of each volume, computed once: they are kept by the content of the volume and by the extractor.

    A stored file that is damaged (its checksum, its shape, values that are not finite) is computed anew. What was
    stored before a stop is used at the next start.

    Args:
        volumes: (N, 1, I, J, K), p0-p99.5 scale; any sequence of (1, I, J, K), read a batch at a time.
        folder: where features of all extractors are kept.
        keys: of the volumes' contents, where they are known.
        share: of this process.
        progress: called with (volumes done, volumes in all).
    """
    place = Path(folder) / _key(extractor)
    keys = [_content(volumes[i]) for i in range(len(volumes))] if keys is None else keys
    files = [place / f"{key}.npz" for key in keys]
    missing = [i for i, file in enumerate(files) if share.mine(i) and not _whole(file, extractor.planes)]
    done, slowest_s = len(files) - len(missing), 0.0
    for start in range(0, len(missing), batch_size):
        began_s = time.perf_counter()
        some = missing[start : start + batch_size]
        features = extractor(torch.stack([as_tensor(volumes[i]) for i in some]).float())
        for row, i in enumerate(some):
            _store(files[i], {plane: features[plane][row].numpy() for plane in extractor.planes})
        done, slowest_s = done + len(some), max(slowest_s, time.perf_counter() - began_s)
        if progress is not None:
            progress(done, len(files))
    share.wait(files, slowest_s)
    return FeatureSet(files, extractor.planes)


def _key(extractor: Extractor) -> str:
    """Folder of an extractor: another file of weights or another preprocessing is another one."""
    identity = [STORE_FORMAT, extractor.name, extractor.sha256, extractor.preprocessing]
    return f"{extractor.name}-{sha256_text(json.dumps(identity))[:16]}"


def _content(volume: Tensor | np.ndarray) -> str:
    array = np.ascontiguousarray(as_tensor(volume).numpy(), dtype=np.float32)
    return hashlib.sha256(repr(array.shape).encode() + array.tobytes()).hexdigest()[:32]


def _store(file: Path, planes: dict[str, np.ndarray]) -> None:
    with atomic_path(file) as temporary, temporary.open("wb") as handle:
        np.savez(handle, **planes)  # type: ignore[arg-type]  # its other arguments are no names of planes


def _plane(file: Path, name: str) -> np.ndarray:
    with np.load(file, allow_pickle=False) as planes:
        return planes[name]


def _whole(file: Path, planes: Sequence[str]) -> bool:
    """Whether all planes can be read; a zip archive has a checksum of each."""
    if not file.is_file():
        return False
    try:
        return all((x := _plane(file, name)).ndim == 2 and bool(np.isfinite(x).all()) for name in planes)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, TypeError):
        return False


def batches(volumes: Volumes, batch_size: int) -> Iterator[Tensor]:
    """Float32 batches (B, 1, I, J, K) of a sequence of (1, I, J, K), in order; only one is in memory."""
    for start in range(0, len(volumes), batch_size):
        items = [as_tensor(volumes[i]) for i in range(start, min(start + batch_size, len(volumes)))]
        yield torch.stack(items).float()


def as_tensor(volume: Tensor | np.ndarray) -> Tensor:
    """A tensor of an array of any strides (torch refuses mirrored views)."""
    return volume if isinstance(volume, Tensor) else torch.from_numpy(np.ascontiguousarray(volume))
