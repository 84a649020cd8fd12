from __future__ import annotations

import numpy as np
import pytest
import torch

from neuromf.errors import UserError
from neuromf.metrics.protocol import frechet_baseline, frechet_record, intensity_records


def _normal(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_samples_of_the_real_distribution_are_as_good_as_real_ones() -> None:
    records = frechet_baseline(_normal(60, 4, 0), _normal(120, 4, 1), name="x")
    assert records["frechet_x_ratio"]["value"] == pytest.approx(1, abs=0.4)
    assert records["frechet_x_real_real"]["n"] == 60
    shifted = frechet_baseline(_normal(60, 4, 0) + 1, _normal(120, 4, 1), name="x")
    assert shifted["frechet_x_ratio"]["value"] > 10


def test_a_covariance_of_too_few_volumes_is_shrunk_and_says_so() -> None:
    assert frechet_record(_normal(9, 8, 0), _normal(9, 8, 1), name="x")["frechet_x"]["covariance"] == "sample"
    assert frechet_record(_normal(8, 8, 0), _normal(9, 8, 1), name="x")["frechet_x"]["covariance"] == "shrunk"


def test_three_real_volumes_give_no_baseline() -> None:
    with pytest.raises(UserError, match="4 real"):
        frechet_baseline(_normal(9, 2, 0), _normal(3, 2, 1), name="x")


def test_a_shift_of_all_intensities_is_the_wasserstein_distance() -> None:
    real = np.random.default_rng(0).random((4, 1, 8, 8, 8)).astype(np.float32)
    records, densities = intensity_records(real + 0.2, real)
    assert records["intensity_wasserstein"]["value"] == pytest.approx(0.2, abs=1e-3)
    shift = records["intensity_mean_generated"]["value"] - records["intensity_mean_real"]["value"]
    assert shift == pytest.approx(0.2, abs=1e-5)
    assert sum(densities["real"]) * 0.01 == pytest.approx(1)
