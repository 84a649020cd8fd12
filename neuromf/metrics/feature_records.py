"""The numbers of two sets of features as records (see `metrics.protocol`): one set of records per extractor.

Extractors that see slices give features by plane: each number is the mean over the planes, and lists them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from neuromf.errors import UserError
from neuromf.metrics.distances import (
    Discrepancy,
    Shrinkage,
    frechet_distance,
    frechet_of_moments,
    kid,
    median_distance,
    mmd,
    moments,
)
from neuromf.metrics.features import Extractor
from neuromf.metrics.manifold import DENSITY_NEIGHBOURS, PRECISION_NEIGHBOURS, membership
from neuromf.metrics.protocol import Record, mean_record, record

SPLITS = 20
SPLITS_OF_MANY_FEATURES = 4  # one distance of 2048 features takes seconds
_MANY_FEATURES = 512
KERNEL_SLICES = 4  # of each volume: the time of a kernel distance grows with their square
_IN_MEMORY_BYTES = 1 << 28  # of a plane's features; where there are more they are read for each number anew
_PUBLISHED = ("inception", "radimagenet", "medicalnet")


class Features(Protocol):
    """What is needed of a `FeatureSet`."""

    planes: tuple[str, ...]

    def __len__(self) -> int:
        """N."""
        ...

    def shape(self, plane: str) -> tuple[int, int, int]:
        """(N, S, D)."""
        ...

    def plane(self, name: str, slices: Sequence[int] | None = None) -> Tensor:
        """(N, S, D), of all slices or of some."""
        ...

    def parts(self, name: str, volumes: Sequence[int]) -> Iterator[Tensor]:
        """Slices (n, D) of some volumes, a few at a time."""
        ...

    def vectors(self) -> Tensor:
        """(N, D')."""
        ...


def label(extractor: Extractor) -> str:
    """How metrics end that were made with an extractor: `medicalnet-50` -> `medicalnet_50`."""
    return extractor.name.replace("-", "_")


def frechet_name(name: str) -> str:
    """`fid_...` for the published networks papers use, `frechet_...` for all others."""
    return f"{'fid' if name.startswith(_PUBLISHED) else 'frechet'}_{name.replace('-', '_')}"


def about(extractor: Extractor) -> dict[str, str]:
    """What every number made with an extractor carries."""
    return {
        "extractor": extractor.name,
        "weights_sha256": extractor.sha256,
        "features_preprocessing": extractor.preprocessing,
    }


def frechet_record(generated: Features, real: Features, extractor: Extractor) -> dict[str, Record]:
    """Frechet distance of the full sets; compare at equal N only."""
    planes, shrinkage, dimension = {}, "none", 0
    for plane in generated.planes:
        a, b = _Plane(generated, plane), _Plane(real, plane)
        dimension = a.dimension
        shrinkage = _estimator(min(len(a), len(b)) * a.slices, dimension)
        planes[plane] = a.frechet(range(len(a)), b, range(len(b)), shrinkage)
    entry = _frechet(float(np.mean(list(planes.values()))), _counts(generated, real), dimension, shrinkage)
    return {frechet_name(extractor.name): entry | _by_plane(planes) | about(extractor)}


def frechet_baseline(generated: Features, real: Features, extractor: Extractor, *, seed: int = 0) -> dict[str, Record]:
    """Frechet distance beside that of real against real volumes, at equal N.

    Over random splits of the real set into halves A and B of n = min(N, M // 2) volumes:
    `..._equal_n`, the mean distance of n generated volumes to B; `..._real_real`, that of A to B; `low` and
    `high` are the 2.5th and 97.5th percentile over the splits (their spread, no confidence interval).
    `..._ratio` = equal_n / real_real: 1 is as good as fresh real volumes.

    Raises:
        UserError: fewer than 2 generated or 4 real volumes.
    """
    n = min(len(generated), len(real) // 2)
    if n < 2:
        raise UserError(
            f"the real-real baseline needs 2 generated and 4 real volumes, got {len(generated)} and {len(real)}"
        )
    against, baseline = [], []
    shrinkage, dimension = "none", 0
    for plane in generated.planes:
        a, b = _Plane(generated, plane), _Plane(real, plane)
        dimension = a.dimension
        shrinkage = _estimator(n * a.slices, dimension)
        splits = SPLITS if min(dimension, 2 * n * a.slices) <= _MANY_FEATURES else SPLITS_OF_MANY_FEATURES
        pairs = [_split(a, b, n, seed * SPLITS + split, shrinkage) for split in range(splits)]
        against.append([pair[0] for pair in pairs])
        baseline.append([pair[1] for pair in pairs])
    name, records = frechet_name(extractor.name), {}
    for suffix, values in (("equal_n", np.mean(against, axis=0)), ("real_real", np.mean(baseline, axis=0))):
        low, high = np.percentile(values, [2.5, 97.5]).tolist()
        entry = _frechet(float(values.mean()), n, dimension, shrinkage) | about(extractor)
        records[f"{name}_{suffix}"] = entry | {"low": low, "high": high, "splits": len(values)}
    if np.mean(baseline) > 0:
        ratio = float(np.mean(against) / np.mean(baseline))
        records[f"{name}_ratio"] = _frechet(ratio, n, dimension, shrinkage) | about(extractor)
    return records


def kernel_records(generated: Features, real: Features, extractor: Extractor) -> dict[str, Record]:
    """KID and squared MMD with 95 % jackknife intervals; 0 inside one means no difference was seen.

    Of slices, `KERNEL_SLICES` of each volume are compared, evenly spread over those there are.
    """
    found: dict[str, dict[str, Discrepancy]] = {"kid": {}, "mmd": {}}
    bandwidths = {}
    for plane in generated.planes:
        a, b = (features.plane(plane, _thinned(features.shape(plane)[1])) for features in (generated, real))
        bandwidths[plane] = median_distance(b)
        found["kid"][plane] = kid(a, b)
        found["mmd"][plane] = mmd(a, b, bandwidth=bandwidths[plane])
    kernels: dict[str, dict[str, Any]] = {
        "kid": {"kernel": "cubic polynomial"},
        "mmd": {"kernel": "Gaussian", "bandwidth": float(np.mean(list(bandwidths.values())))},
    }
    return {
        f"{metric}_{label(extractor)}": _kernel_record(planes, _counts(generated, real), kernels[metric])
        | about(extractor)
        for metric, planes in found.items()
    }


def _kernel_record(planes: dict[str, Discrepancy], counts: dict[str, int], kernel: dict[str, Any]) -> Record:
    """The mean over the planes, whose leave-one-out values are the means of theirs."""
    whole = Discrepancy(
        float(np.mean([plane.value for plane in planes.values()])),
        torch.stack([plane.without_a for plane in planes.values()]).mean(0),
        torch.stack([plane.without_b for plane in planes.values()]).mean(0),
    )
    values = {"generated": whole.without_a, "real": whole.without_b}
    entry = record(whole.estimate(), "lower", **kernel, per_volume="leave one out", values=values, n=counts)
    return entry | _by_plane({name: plane.value for name, plane in planes.items()})


def manifold_records(generated: Features, real: Features, extractor: Extractor, *, seed: int = 0) -> dict[str, Record]:
    """Precision, recall, density and coverage of volumes; intervals by bootstrap over the volumes they are means of.

    The other set, and with it the neighbourhoods, is held as it is: its own chance is not in the interval.
    """
    found = membership(generated.vectors(), real.vectors())
    k = {"precision": PRECISION_NEIGHBOURS, "recall": PRECISION_NEIGHBOURS}
    return {
        f"{metric}_{label(extractor)}": mean_record(
            values,
            "higher",
            seed=seed,
            of="generated" if metric in ("precision", "density") else "real",
            n=_counts(generated, real),
            neighbours=k.get(metric, DENSITY_NEIGHBOURS),
        )
        | about(extractor)
        for metric, values in found._asdict().items()
    }


class _Plane:
    """The features of a set in one plane: in memory where they fit, else read again for each number."""

    def __init__(self, features: Features, name: str) -> None:
        self._features, self._name = features, name
        self._n, self.slices, self.dimension = features.shape(name)
        fits = 4 * self._n * self.slices * self.dimension <= _IN_MEMORY_BYTES
        self._whole = features.plane(name) if fits else None

    def __len__(self) -> int:
        return self._n

    def frechet(
        self, volumes: Sequence[int], other: _Plane, other_volumes: Sequence[int], shrinkage: Shrinkage
    ) -> float:
        """Frechet distance of some volumes to some of another set."""
        if shrinkage == "none" and (self._whole is None or other._whole is None):
            parts = self._features.parts(self._name, volumes), other._features.parts(other._name, other_volumes)
            return frechet_of_moments(*(moments(part) for part in parts))
        return frechet_distance(self._of(volumes), other._of(other_volumes), shrinkage=shrinkage)

    def _of(self, volumes: Sequence[int]) -> Tensor:
        """(n, S, D)."""
        whole = self._features.plane(self._name) if self._whole is None else self._whole
        return whole if len(volumes) == len(whole) else whole[list(volumes)]


def _split(a: _Plane, b: _Plane, n: int, seed: int, shrinkage: Shrinkage) -> tuple[float, float]:
    """Distances of n generated volumes, and of n real ones, to the same n other real ones."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(b), generator=generator).tolist()
    half_a, half_b = order[:n], order[n : 2 * n]
    some = torch.randperm(len(a), generator=generator)[:n].tolist()
    return a.frechet(some, b, half_b, shrinkage), b.frechet(half_a, b, half_b, shrinkage)


def _estimator(items: int, dimension: int) -> Shrinkage:
    """A sample covariance of n <= D items is singular: it is shrunk, and the record says so."""
    return "none" if items > dimension else "ledoit-wolf"


def _thinned(slices: int) -> list[int]:
    """At most `KERNEL_SLICES` of the slices, the middles of as many equal parts."""
    kept = min(slices, KERNEL_SLICES)
    return [int(slices * (s + 0.5) / kept) for s in range(kept)]


def _counts(generated: Features, real: Features) -> dict[str, int]:
    return {"generated": len(generated), "real": len(real)}


def _by_plane(values: dict[str, float]) -> dict[str, Any]:
    return {"planes": values} if len(values) > 1 else {}


def _frechet(value: float, n: int | dict[str, int], dimension: int, shrinkage: str) -> Record:
    covariance = "sample" if shrinkage == "none" else "shrunk"
    shape = {"value": value, "low": None, "high": None, "n": n, "better": "lower"}
    return shape | {"dimension": dimension, "covariance": covariance}
