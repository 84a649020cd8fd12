from __future__ import annotations

import pytest
import torch
from torch import Tensor

from neuromf.errors import UserError
from neuromf.metrics.manifold import membership


def _normal(n: int, seed: int, d: int = 3) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _reach(x: Tensor, i: int, k: int) -> float:
    """Distance of x[i] to its k-th nearest other."""
    return sorted(float((x[i] - x[j]).norm()) for j in range(len(x)) if j != i)[k - 1]


def test_membership_is_the_papers_definition_by_loops() -> None:
    fake, real = _normal(9, 0) * 1.3 + 0.4, _normal(11, 1)
    found = membership(fake, real, precision_k=2, density_k=3)
    for j, y in enumerate(fake):
        inside = [float((y - real[i]).norm()) <= _reach(real, i, 2) for i in range(11)]
        wider = [float((y - real[i]).norm()) <= _reach(real, i, 3) for i in range(11)]
        assert float(found.precision[j]) == any(inside)
        assert float(found.density[j]) == pytest.approx(sum(wider) / 3)
    for i, x in enumerate(real):
        inside = [float((x - fake[j]).norm()) <= _reach(fake, j, 2) for j in range(9)]
        covered = [float((x - fake[j]).norm()) <= _reach(real, i, 3) for j in range(9)]
        assert float(found.recall[i]) == any(inside)
        assert float(found.coverage[i]) == any(covered)


def test_equal_distributions_score_high_and_density_is_one_on_average() -> None:
    found = membership(_normal(400, 2), _normal(400, 3))
    assert float(found.density.mean()) == pytest.approx(1, abs=0.15)
    assert all(float(x.mean()) > 0.9 for x in (found.precision, found.recall, found.coverage))


def test_a_collapsed_set_keeps_precision_and_loses_recall_and_coverage() -> None:
    real = _normal(200, 4)
    collapsed = 0.05 * _normal(200, 5)
    found = membership(collapsed, real)
    assert float(found.precision.mean()) > 0.9
    assert float(found.recall.mean()) < 0.1
    assert float(found.coverage.mean()) < 0.3


def test_a_set_far_away_has_neither() -> None:
    found = membership(_normal(50, 6) + 100, _normal(50, 7))
    assert all(float(x.sum()) == 0 for x in found)


def test_sets_without_enough_neighbours_or_of_other_widths_are_refused() -> None:
    with pytest.raises(UserError, match="at least 6"):
        membership(_normal(5, 0), _normal(20, 1))
    with pytest.raises(UserError, match="cannot be compared"):
        membership(_normal(20, 0), _normal(20, 1, d=4))
    with pytest.raises(UserError, match="NaN"):
        membership(_normal(20, 0), _normal(20, 1) * float("nan"))
