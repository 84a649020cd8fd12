"""The numbers of two sets of features as records (see `metrics.protocol`): one set of records per extractor.

Extractors that see slices give features by plane: each number is the mean over the planes, and lists them. Its interval
is the mean of the planes' intervals: they see the same volumes, and it is no wider than that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from neuromf.errors import UserError
from neuromf.metrics.distances import Shrinkage, frechet_distance, kid, median_distance, mmd
from neuromf.metrics.features import Extractor
from neuromf.metrics.manifold import DENSITY_NEIGHBOURS, PRECISION_NEIGHBOURS, membership
from neuromf.metrics.protocol import Record, mean_record, record
from neuromf.metrics.statistics import Estimate

SPLITS = 20
SPLITS_OF_MANY_FEATURES = 4  # one distance of 2048 features takes seconds
_MANY_FEATURES = 512
KERNEL_SLICES = 4  # of each volume: the time of a kernel distance grows with their square
_PUBLISHED = ("inception", "radimagenet", "medicalnet")


class Features(Protocol):
    """What is needed of a `FeatureSet`."""

    planes: tuple[str, ...]

    def __len__(self) -> int:
        """N."""
        ...

    def plane(self, name: str) -> Tensor:
        """(N, S, D)."""
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
        a, b = generated.plane(plane), real.plane(plane)
        shrinkage, dimension = _estimator(min(_items(a), _items(b)), a.shape[-1]), a.shape[-1]
        planes[plane] = frechet_distance(a, b, shrinkage=shrinkage)
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
        a, b = generated.plane(plane), real.plane(plane)
        dimension = a.shape[-1]
        shrinkage = _estimator(n * a.shape[1], dimension)
        splits = SPLITS if min(dimension, 2 * n * a.shape[1]) <= _MANY_FEATURES else SPLITS_OF_MANY_FEATURES
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
    found: dict[str, dict[str, Estimate]] = {"kid": {}, "mmd": {}}
    bandwidths = {}
    for plane in generated.planes:
        a, b = (_thinned(features.plane(plane)) for features in (generated, real))
        bandwidths[plane] = median_distance(a, b)
        found["kid"][plane] = kid(a, b)
        found["mmd"][plane] = mmd(a, b, bandwidth=bandwidths[plane])
    kernels: dict[str, dict[str, Any]] = {
        "kid": {"kernel": "cubic polynomial"},
        "mmd": {"kernel": "Gaussian", "bandwidth": float(np.mean(list(bandwidths.values())))},
    }
    return {
        f"{metric}_{label(extractor)}": record(_mean(list(planes.values())), "lower", **kernels[metric])
        | {"n": _counts(generated, real)}
        | _by_plane({plane: estimate.value for plane, estimate in planes.items()})
        | about(extractor)
        for metric, planes in found.items()
    }


def manifold_records(generated: Features, real: Features, extractor: Extractor, *, seed: int = 0) -> dict[str, Record]:
    """Precision, recall, density and coverage of volumes; intervals by bootstrap over the volumes they are means of.

    The other set, and with it the neighbourhoods, is held as it is: its own chance is not in the interval.
    """
    found = membership(generated.vectors(), real.vectors())
    k = {"precision": PRECISION_NEIGHBOURS, "recall": PRECISION_NEIGHBOURS}
    return {
        f"{metric}_{label(extractor)}": mean_record(
            values, "higher", seed=seed, n=_counts(generated, real), neighbours=k.get(metric, DENSITY_NEIGHBOURS)
        )
        | about(extractor)
        for metric, values in found._asdict().items()
    }


def _split(a: Tensor, b: Tensor, n: int, seed: int, shrinkage: Shrinkage) -> tuple[float, float]:
    """Distances of n generated volumes (N, S, D), and of n real ones (M, S, D), to the same n other real ones."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(b), generator=generator)
    half_a, half_b = b[order[:n]], b[order[n : 2 * n]]
    some = a[torch.randperm(len(a), generator=generator)[:n]]
    return (
        frechet_distance(some, half_b, shrinkage=shrinkage),
        frechet_distance(half_a, half_b, shrinkage=shrinkage),
    )


def _estimator(items: int, dimension: int) -> Shrinkage:
    """A sample covariance of n <= D items is singular: it is shrunk, and the record says so."""
    return "none" if items > dimension else "ledoit-wolf"


def _items(features: Tensor) -> int:
    return features.shape[0] * features.shape[1]


def _thinned(features: Tensor) -> Tensor:
    """At most `KERNEL_SLICES` of the S slices, the middles of as many equal parts."""
    n = features.shape[1]
    kept = min(n, KERNEL_SLICES)
    return features[:, [int(n * (s + 0.5) / kept) for s in range(kept)]]


def _counts(generated: Features, real: Features) -> dict[str, int]:
    return {"generated": len(generated), "real": len(real)}


def _mean(estimates: Sequence[Estimate]) -> Estimate:
    value, low, high = (float(np.mean([e[i] for e in estimates])) for i in range(3))
    return Estimate(value, low, high, min(e.n for e in estimates))


def _by_plane(values: dict[str, float]) -> dict[str, Any]:
    return {"planes": values} if len(values) > 1 else {}


def _frechet(value: float, n: int | dict[str, int], dimension: int, shrinkage: str) -> Record:
    covariance = "sample" if shrinkage == "none" else "shrunk"
    shape = {"value": value, "low": None, "high": None, "n": n, "better": "lower"}
    return shape | {"dimension": dimension, "covariance": covariance}
