"""The two toy problems: what there is to learn, and how a sample is measured against it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neuromf.data.torus import BlobTorus, FlatTorus, Manifold, TorusSplit, torus_split
from neuromf.metrics.torus import (
    TorusReader,
    angle_errors,
    flat_angles,
    flat_distance,
    norm_error,
    relative_residual,
)

POINTS, VOLUMES = 25_000, 10_000
HELD_BACK, READER_VOLUMES = 4_000, 2_000


class Measured(NamedTuple):
    """Samples against the flat torus, on which volumes are placed by regression.

    distance: (N,) to the torus in R^4.
    norm_error: (N,) |norm - 1|.
    angles: (N, 2) of the nearest points, radians.
    residual: (N,) for volumes: how far they are from the ideal ones at their angles, relative to the spread.
    """

    distance: Tensor
    norm_error: Tensor
    angles: Tensor
    residual: Tensor | None = None


class Problem(NamedTuple):
    """A manifold, its data for one seed, and the ruler.

    Attributes:
        measure: unwhitened (N, C, I, J, K) -> `Measured`.
        facts: what the report says about the data and the ruler.
    """

    name: str
    manifold: Manifold
    split: TorusSplit
    measure: Callable[[Tensor], Measured]
    facts: dict[str, Any]

    @property
    def held_back(self) -> Tensor:
        """Real points that nothing was fitted to, unwhitened."""
        return self.manifold.points(self.split.held_back.angles[READER_VOLUMES:])

    def description(self) -> dict[str, Any]:
        """data.json of a run: as of a folder of latents, with no autoencoder behind it."""
        description = {
            "latent_shape": list(self.manifold.shape),
            "autoencoder": {"name": "none", "sha256": "", "factor": 1},
            "preprocessing": None,
            "affine": None,
            "statistics": self.split.statistics.to_dict(),
            "subjects": {"train": len(self.split.train), "val": len(self.split.held_back), "test": 0},
        }
        angles = self.split.train.angles.numpy().tobytes()
        digest = hashlib.sha256(repr(description).encode() + angles).hexdigest()
        return {**description, "split_hash": digest, "digest": digest, "latents": self.name}


def flat_problem(seed: int) -> Problem:
    """Points of the flat torus in R^4."""
    manifold = FlatTorus()
    split = torus_split(manifold, POINTS, HELD_BACK, seed)
    return Problem("flat torus in R^4", manifold, split, _measure_points, {"points": POINTS})


def blob_problem(seed: int, size: int) -> Problem:
    """Volumes of blobs; where they lie on the torus is read by a regression fitted to held-back real volumes."""
    manifold = BlobTorus(size)
    split = torus_split(manifold, VOLUMES, HELD_BACK, seed)
    known, unseen = split.held_back.angles.split([READER_VOLUMES, HELD_BACK - READER_VOLUMES])
    real = manifold.points(known)
    reader = TorusReader(real, FlatTorus().points(known))
    spread = float((real - real.mean(0)).square().mean().sqrt())

    def measure(x: Tensor) -> Measured:
        found = _measure_points(reader(x))
        return found._replace(residual=relative_residual(x, manifold.points, found.angles, spread))

    found = measure(manifold.points(unseen))
    assert found.residual is not None
    facts = {
        "volumes": VOLUMES,
        "cells per axis": size,
        "of real volumes: angle error (rad)": float(angle_errors(found.angles, unseen).mean()),
        "distance": float(found.distance.mean()),
        "residual": float(found.residual.mean()),
    }
    return Problem(f"blobs of two angles, 4 x {size}^3", manifold, split, measure, facts)


def _measure_points(x: Tensor) -> Measured:
    return Measured(flat_distance(x), norm_error(x), flat_angles(x))


def data_faults(problem: Problem) -> list[str]:
    """What is wrong with a problem's own data (gate P2-T1); nothing, normally."""
    whitened = torch.stack(problem.split.train.__getitems__(range(min(len(problem.split.train), 2_000))))
    real = problem.measure(problem.held_back)
    error = angle_errors(real.angles, problem.split.held_back.angles[READER_VOLUMES:])
    checks = {
        "points are finite": bool(torch.isfinite(whitened).all()),
        "training points are whitened": bool((whitened.mean((0, 2, 3, 4)).abs() < 0.1).all())
        and bool(((whitened.std((0, 2, 3, 4)) - 1).abs() < 0.1).all()),
        "real points lie on the manifold": float(real.distance.mean()) < 0.02,
        "their angles are found": float(error.mean()) < 0.02,
    }
    return [name for name, holds in checks.items() if not holds]
