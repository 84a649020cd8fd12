from __future__ import annotations

import numpy as np
import pytest

from neuromf.metrics.protocol import intensity_records


def test_a_shift_of_all_intensities_is_the_wasserstein_distance() -> None:
    real = np.random.default_rng(0).random((4, 1, 8, 8, 8)).astype(np.float32)
    records, densities = intensity_records(real + 0.2, real)
    assert records["intensity_wasserstein"]["value"] == pytest.approx(0.2, abs=1e-3)
    shift = records["intensity_mean_generated"]["value"] - records["intensity_mean_real"]["value"]
    assert shift == pytest.approx(0.2, abs=1e-5)
    assert sum(densities["real"]) * 0.01 == pytest.approx(1)
