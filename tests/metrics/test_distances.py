from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from neuromf.errors import UserError
from neuromf.metrics.distances import (
    frechet_distance,
    frechet_of_moments,
    kid,
    ledoit_wolf_share,
    median_distance,
    mmd,
    moments,
)
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
    assert kid(a, b, block=2).estimate() == pytest.approx(kid(a, b).estimate(), rel=1e-10)


def test_kid_interval_is_the_jackknife_by_leaving_out() -> None:
    a, b = _normal(6, 3, 17), _normal(8, 3, 18) + 0.4
    without_a = torch.tensor([_kid_by_loops(torch.cat([a[:i], a[i + 1 :]]), b) for i in range(6)]).double()
    without_b = torch.tensor([_kid_by_loops(a, torch.cat([b[:i], b[i + 1 :]])) for i in range(8)]).double()
    variance = 5 * without_a.var(correction=0) + 7 * without_b.var(correction=0)
    torch.testing.assert_close(kid(a, b).without_b, without_b, rtol=1e-5, atol=0)
    estimate = kid(a, b).estimate()
    assert estimate.high - estimate.value == pytest.approx(1.959964 * float(variance.sqrt()), rel=1e-5)
    assert estimate.n == 6


def test_kid_of_equal_distributions_is_zero_on_average_and_mostly_covered() -> None:
    estimates = [kid(_normal(40, 4, 100 + s), _normal(40, 4, 200 + s)).estimate() for s in range(60)]
    values = torch.tensor([e.value for e in estimates])
    assert abs(float(values.mean())) < 3 * float(values.std()) / 60**0.5
    assert sum(e.low <= 0 <= e.high for e in estimates) >= 54


def test_kid_agrees_with_torchmetrics() -> None:
    prepare_torchvision()
    theirs = pytest.importorskip("torchmetrics.image.kid")
    a, b = _normal(12, 5, 19), _normal(12, 5, 20) + 0.3
    assert kid(a, b).value == pytest.approx(float(theirs.poly_mmd(a, b)), rel=1e-8)


@pytest.mark.parametrize("distance", [frechet_distance, kid, mmd])
def test_sets_too_small_of_different_width_or_not_finite_are_refused(distance) -> None:
    good = _normal(5, 3, 0)
    with pytest.raises(UserError, match="at least"):
        distance(good[:1], good)
    with pytest.raises(UserError, match="same D"):
        distance(good, _normal(5, 4, 0))
    with pytest.raises(UserError, match="NaN"):
        distance(good, good * float("nan"))


# --- fewer items than features, slices, the Gaussian kernel ----------------------------------------------------------


def _frechet_in_full(a: Tensor, b: Tensor, shrinkage: str) -> float:
    """By D x D matrices and SciPy's matrix root."""
    scipy_linalg = pytest.importorskip("scipy.linalg")
    covariances = []
    for x in (a, b):
        covariance, share = torch.cov(x.T), ledoit_wolf_share(x) if shrinkage == "ledoit-wolf" else 0.0
        identity = torch.eye(x.shape[1], dtype=torch.float64) * covariance.trace() / x.shape[1]
        covariances.append((1 - share) * covariance + share * identity)
    product = covariances[0] @ covariances[1]
    # A little of the identity: SciPy's root of a singular matrix is not exact.
    root = torch.as_tensor(scipy_linalg.sqrtm((product + 1e-13 * torch.eye(len(product))).numpy()).real)
    return float((a.mean(0) - b.mean(0)).square().sum() + (sum(covariances) - 2 * root).trace())


@pytest.mark.parametrize("shrinkage", ["none", "ledoit-wolf"])
def test_frechet_of_fewer_items_than_features_is_that_of_the_full_matrices(shrinkage) -> None:
    a, b = _normal(9, 40, 30), 1.3 * _normal(12, 40, 31) + 0.2
    assert frechet_distance(a, b, shrinkage=shrinkage) == pytest.approx(_frechet_in_full(a, b, shrinkage), rel=1e-4)


def test_frechet_of_slices_takes_each_as_an_item() -> None:
    a, b = _normal(24, 5, 32), _normal(30, 5, 33) + 1
    assert frechet_distance(a.reshape(8, 3, 5), b.reshape(10, 3, 5)) == pytest.approx(frechet_distance(a, b), rel=1e-10)


def _mmd_by_loops(a: Tensor, b: Tensor, kernel) -> float:
    """U-statistic over volumes (N, S, D), of kernels averaged over pairs of slices."""

    def between(x: Tensor, y: Tensor) -> float:
        return sum(kernel(u, v) for u in x for v in y) / (len(x) * len(y))

    def within(x: Tensor) -> float:
        pairs = list(itertools.permutations(range(len(x)), 2))
        return sum(between(x[i], x[j]) for i, j in pairs) / len(pairs)

    return within(a) + within(b) - 2 * sum(between(x, y) for x in a for y in b) / (len(a) * len(b))


@pytest.mark.parametrize("block", [2, 256])
def test_kernel_distances_of_slices_compare_volumes(block: int) -> None:
    a, b = _normal(12, 4, 34).reshape(4, 3, 4), _normal(10, 4, 35).reshape(5, 2, 4) + 0.5
    cubic = _mmd_by_loops(a, b, lambda u, v: float((u @ v / 4 + 1) ** 3))
    assert kid(a, b, block=block).value == pytest.approx(cubic, rel=1e-10)
    gaussian = _mmd_by_loops(a, b, lambda u, v: float(torch.exp(-(u - v).square().sum() / (2 * 1.5**2))))
    assert mmd(a, b, bandwidth=1.5, block=block).value == pytest.approx(gaussian, rel=1e-10)


def test_slices_of_the_same_volumes_do_not_pass_as_new_ones() -> None:
    offset = 3 * _normal(60, 1, 36)[:, None]  # slices of a volume are alike
    a, b = (offset[i::2] + _normal(30, 8, seed)[:, :, None] for i, seed in ((0, 37), (1, 38)))
    by_volume = kid(a, b).estimate()
    by_slice = kid(a.flatten(0, 1), b.flatten(0, 1)).estimate()
    assert by_volume.high - by_volume.low > 1.5 * (by_slice.high - by_slice.low)
    assert by_volume.low <= 0 <= by_volume.high


def test_mmd_of_two_gaussians_is_the_closed_form() -> None:
    """E k of N(0, v I) and N(m, v I): (s^2 / (s^2 + 2 v))^(D/2) exp(-|m|^2 / (2 (s^2 + 2 v)))."""
    shift, s = 0.8, 1.2
    a, b = _normal(1500, 2, 39), _normal(1500, 2, 40)
    b[:, 0] += shift
    scale = s * s / (s * s + 2)
    expected = 2 * scale * (1 - torch.exp(torch.tensor(-(shift**2) / (2 * (s * s + 2)))))
    estimate = mmd(a, b, bandwidth=s).estimate()
    assert estimate.low <= float(expected) <= estimate.high
    assert estimate.high - estimate.low < 0.5 * estimate.value


def test_the_bandwidth_is_the_median_distance_within_the_second_set() -> None:
    a, b = _normal(7, 3, 41), _normal(6, 3, 42) + 2
    distances = [float((x - y).norm()) for x, y in itertools.combinations(b, 2)]
    assert median_distance(b) == pytest.approx(sorted(distances)[(len(distances) - 1) // 2])
    assert mmd(a, b).value == mmd(a, b, bandwidth=median_distance(b)).value
    with pytest.raises(UserError, match="all features are equal"):
        mmd(torch.ones(4, 2), torch.ones(4, 2))


def test_kid_is_what_the_customary_mean_over_subsets_tends_to() -> None:
    prepare_torchvision()
    theirs = pytest.importorskip("torchmetrics.image.kid")
    a, b = _normal(80, 4, 43), _normal(80, 4, 44) + 0.3
    generator = torch.Generator().manual_seed(0)
    subsets = [
        float(theirs.poly_mmd(*(x[torch.randperm(80, generator=generator)[:20]] for x in (a, b)))) for _ in range(200)
    ]
    mean, error = torch.tensor(subsets).mean(), torch.tensor(subsets).std() / 200**0.5
    assert abs(kid(a, b).value - float(mean)) < 3 * float(error)


def test_frechet_agrees_with_monai() -> None:
    fid = pytest.importorskip("monai.metrics.fid")
    a, b = _normal(60, 5, 45), 0.7 * _normal(70, 5, 46) + 0.4
    assert frechet_distance(a, b) == pytest.approx(float(fid.get_fid_score(a, b)), rel=1e-4)


# --- sets that do not fit in memory ----------------------------------------------------------------------------------


def test_moments_of_parts_are_those_of_the_whole_far_from_zero_too() -> None:
    x = _normal(23, 4, 50) * torch.tensor([1.0, 2.0, 0.1, 5.0], dtype=torch.float64) + 1e4
    found = moments(iter(x.split(5)))
    assert found.n == 23
    torch.testing.assert_close(found.mean, x.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(found.covariance, torch.cov(x.T), rtol=1e-9, atol=1e-12)


def test_frechet_of_moments_is_that_of_the_features() -> None:
    a, b = _normal(40, 5, 51), 0.7 * _normal(30, 5, 52) + 0.4
    streamed = frechet_of_moments(moments(a.split(7)), moments(b.split(11)))
    assert streamed == pytest.approx(frechet_distance(a, b), rel=1e-10)


def test_moments_of_one_item_or_of_nan_are_refused() -> None:
    with pytest.raises(UserError, match="at least 2"):
        moments([torch.ones(1, 3)])
    with pytest.raises(UserError, match="NaN"):
        moments([torch.ones(2, 3), torch.full((2, 3), float("nan"))])
