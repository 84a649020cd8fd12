from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from neuromf.errors import UserError
from neuromf.metrics.distances import frechet_distance, kid, ledoit_wolf_share
from neuromf.vision_shim import prepare_torchvision


def _normal(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _with_moments(x: Tensor, mean: Tensor, root: Tensor) -> Tensor:
    """Move a sample so that its mean is `mean` and its covariance root @ root.T, exactly."""
    x = x - x.mean(0)
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False).T
    return whitened @ root.T + mean


def test_frechet_of_diagonal_gaussians_is_the_closed_form() -> None:
    mean = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    deviation_a, deviation_b = torch.tensor([[1.0, 2.0, 3.0], [0.5, 2.5, 3.0]], dtype=torch.float64)
    a = _with_moments(_normal(50, 3, 0), torch.zeros(3, dtype=torch.float64), deviation_a.diag())
    b = _with_moments(_normal(70, 3, 1), mean, deviation_b.diag())
    expected = float(mean.square().sum() + (deviation_a - deviation_b).square().sum())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_agrees_with_scipy_sqrtm_for_full_covariances() -> None:
    scipy_linalg = pytest.importorskip("scipy.linalg")
    a, b = _normal(60, 6, 2) @ _normal(6, 6, 3), _normal(50, 6, 4) @ _normal(6, 6, 5) + 0.3
    covariance_a, covariance_b = torch.cov(a.T), torch.cov(b.T)
    root = torch.as_tensor(scipy_linalg.sqrtm((covariance_a @ covariance_b).numpy()).real)
    expected = (a.mean(0) - b.mean(0)).square().sum() + (covariance_a + covariance_b - 2 * root).trace()
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-8)


def test_frechet_agrees_with_torchmetrics() -> None:
    prepare_torchvision()
    fid = pytest.importorskip("torchmetrics.image.fid")
    a, b = _normal(80, 5, 6), 1.4 * _normal(60, 5, 7) + 0.2
    theirs = fid._compute_fid(a.mean(0), torch.cov(a.T), b.mean(0), torch.cov(b.T))
    assert frechet_distance(a, b) == pytest.approx(float(theirs), rel=1e-8)


@pytest.mark.parametrize("shrinkage", ["none", "ledoit-wolf"])
def test_frechet_of_a_set_with_itself_is_zero_even_when_singular(shrinkage) -> None:
    features = _normal(10, 30, 8)
    assert frechet_distance(features, features.clone(), shrinkage=shrinkage) == pytest.approx(0, abs=1e-5)


def test_frechet_is_symmetric_and_does_not_see_rotations() -> None:
    a, b = _normal(40, 5, 9), _normal(30, 5, 10) * 2 + 1
    rotation = torch.linalg.qr(_normal(5, 5, 11)).Q
    distance = frechet_distance(a, b)
    assert frechet_distance(b, a) == pytest.approx(distance, rel=1e-9)
    assert frechet_distance(a @ rotation, b @ rotation) == pytest.approx(distance, rel=1e-9)


def test_ledoit_wolf_share_is_the_published_formula() -> None:
    x = _normal(25, 8, 12) @ torch.diag(torch.arange(1.0, 9.0, dtype=torch.float64))
    centred = x - x.mean(0)
    n = len(x)
    covariance = centred.T @ centred / n
    identity = covariance.trace() / 8 * torch.eye(8, dtype=torch.float64)
    spread = (covariance - identity).square().sum()
    noise = sum((torch.outer(row, row) - covariance).square().sum() for row in centred) / n**2
    assert ledoit_wolf_share(x) == pytest.approx(float(noise / spread), rel=1e-10)


def test_shrinkage_brings_small_samples_nearer_to_the_truth() -> None:
    distances = {
        s: frechet_distance(_normal(20, 40, 13), _normal(20, 40, 14), shrinkage=s)  # the truth is 0
        for s in ("none", "ledoit-wolf")
    }
    assert distances["ledoit-wolf"] < 0.5 * distances["none"]


def _kid_by_loops(a: Tensor, b: Tensor) -> float:
    def kernel(x: Tensor, y: Tensor) -> float:
        return float((x @ y / len(x) + 1) ** 3)

    def within(x: Tensor) -> float:
        pairs = list(itertools.permutations(range(len(x)), 2))
        return sum(kernel(x[i], x[j]) for i, j in pairs) / len(pairs)

    across = [kernel(x, y) for x in a for y in b]
    return within(a) + within(b) - 2 * sum(across) / len(across)


def test_kid_is_the_unbiased_estimator_of_all_pairs() -> None:
    a, b = _normal(7, 4, 15), _normal(9, 4, 16) + 0.5
    assert kid(a, b).value == pytest.approx(_kid_by_loops(a, b), rel=1e-10)
    assert kid(a, b, block=2) == pytest.approx(kid(a, b), rel=1e-10)


def test_kid_interval_is_the_jackknife_by_leaving_out() -> None:
    a, b = _normal(6, 3, 17), _normal(8, 3, 18) + 0.4
    without_a = torch.tensor([_kid_by_loops(torch.cat([a[:i], a[i + 1 :]]), b) for i in range(6)])
    without_b = torch.tensor([_kid_by_loops(a, torch.cat([b[:i], b[i + 1 :]])) for i in range(8)])
    variance = 5 * without_a.var(correction=0) + 7 * without_b.var(correction=0)
    estimate = kid(a, b)
    assert estimate.high - estimate.value == pytest.approx(1.959964 * float(variance.sqrt()), rel=1e-5)
    assert estimate.n == 6


def test_kid_of_equal_distributions_is_zero_on_average_and_mostly_covered() -> None:
    estimates = [kid(_normal(40, 4, 100 + s), _normal(40, 4, 200 + s)) for s in range(60)]
    values = torch.tensor([e.value for e in estimates])
    assert abs(float(values.mean())) < 3 * float(values.std()) / 60**0.5
    assert sum(e.low <= 0 <= e.high for e in estimates) >= 54


def test_kid_agrees_with_torchmetrics() -> None:
    prepare_torchvision()
    theirs = pytest.importorskip("torchmetrics.image.kid")
    a, b = _normal(12, 5, 19), _normal(12, 5, 20) + 0.3
    assert kid(a, b).value == pytest.approx(float(theirs.poly_mmd(a, b)), rel=1e-8)


@pytest.mark.parametrize("distance", [frechet_distance, kid])
def test_sets_too_small_of_different_width_or_not_finite_are_refused(distance) -> None:
    good = _normal(5, 3, 0)
    with pytest.raises(UserError, match="at least"):
        distance(good[:1], good)
    with pytest.raises(UserError, match="same D"):
        distance(good, _normal(5, 4, 0))
    with pytest.raises(UserError, match="NaN"):
        distance(good, good * float("nan"))
