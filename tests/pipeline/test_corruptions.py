"""Every metric moves the right way, and further the worse real scans were made; copies are found."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.pipeline import corruptions

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def evaluated(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> corruptions.Evaluated:
    return corruptions.evaluate_all(shared_data, tmp_path_factory.mktemp("corruptions"))


# Metric -> corruptions it sees -> whether it rises (+1) or falls (-1) with their strength.
DIRECTIONS = {
    "frechet_builtin": {"blur": 1, "noise": 1, "shuffle": 1},
    "frechet_builtin_ratio": {"blur": 1, "noise": 1, "shuffle": 1},
    "kid_builtin": {"blur": 1, "noise": 1, "shuffle": 1},
    "mmd_builtin": {"blur": 1, "noise": 1, "shuffle": 1},
    "precision_builtin": {"blur": -1, "noise": -1, "shuffle": -1},
    "density_builtin": {"blur": -1, "noise": -1, "shuffle": -1},
    "coverage_builtin": {"blur": -1, "noise": -1, "shuffle": -1},
    "spectrum_distance": {"blur": 1, "noise": 1, "shuffle": 1},
    "high_frequency_energy_generated": {"blur": -1, "noise": 1, "shuffle": 1},
    "ssim_to_original": {"blur": -1, "noise": -1, "shuffle": -1},
    "ms_ssim_to_original": {"blur": -1, "noise": -1, "shuffle": -1},
    "psnr_db_to_original": {"blur": -1, "noise": -1, "shuffle": -1},
    "intensity_wasserstein": {"blur": 1, "noise": 1},
    "memorized_share_pixels": {"copies": 1},
    "memorized_share_builtin": {"copies": 1},
}
CASES = [(metric, name, sign) for metric, signs in DIRECTIONS.items() for name, sign in signs.items()]


@pytest.mark.parametrize(("metric", "corruption", "sign"), CASES)
def test_a_metric_gets_worse_with_the_strength(evaluated, metric: str, corruption: str, sign: int) -> None:
    cases = [("none", 0.0), *((corruption, strength) for strength in corruptions.STRENGTHS[corruption])]
    values = [sign * evaluated.metrics[case][metric]["value"] for case in cases]
    # Shares end at 0 and 1, where they can only stay.
    assert all(a <= b for a, b in itertools.pairwise(values)), values
    assert values[-1] > values[0]


@pytest.mark.parametrize("kind", ["pixels", "builtin"])
def test_copies_are_flagged_and_fresh_volumes_are_not(evaluated, kind: str) -> None:
    for share, copies in evaluated.copies.items():
        found = corruptions.detection(evaluated.reports["copies", share], kind, copies)
        assert found.recall >= 0.95
        assert found.false_alarms <= 0.05
    assert corruptions.detection(evaluated.reports["none", 0.0], kind, set()).false_alarms <= 0.05
